"""What an exchange needs of a worker's optimizers: rates, look-ahead points, a clean restart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import elastic
from lightning_easgd.flat import as_real
from lightning_easgd.segments import Piece


class LocalOptimizers:
    """The optimizers of one worker, read at each use because groups may be added while training.

    Args:
        current: gives the optimizers.
    """

    def __init__(self, current: Callable[[], Sequence[Optimizer]]) -> None:
        self._current = current
        self._made_with: dict[tuple[int, int], tuple[Any, Any]] = {}

    def learning_rates(self) -> dict[int, float]:
        """The current learning rate η of each parameter, by the parameter's identity."""
        return {
            id(parameter): float(group["lr"])
            for optimizer in self._current()
            for group in optimizer.param_groups
            if "lr" in group
            for parameter in group["params"]
        }

    def after_step(self, optimizer: Optimizer) -> None:
        """Remember the learning rate and momentum of the step that ``optimizer`` just took."""
        for key, known, group in self._nesterov_groups():
            if known is optimizer:
                lr = group["lr"]
                lr = lr.clone() if isinstance(lr, Tensor) else lr
                self._made_with[key] = lr, group["momentum"]

    def look_ahead_state(self) -> list[tuple[int, int, float | Tensor, float]]:
        """Optimizer, group, learning rate and momentum of the latest step, for a checkpoint."""
        return [(*key, *made_with) for key, made_with in self._made_with.items()]

    def load_look_ahead_state(self, state: Sequence[Sequence[Any]]) -> None:
        """The inverse of :meth:`look_ahead_state`."""
        self._made_with = {(number, group): (lr, delta) for number, group, lr, delta in state}

    def undo_look_ahead_(self, points: Iterable[tuple[Piece, Tensor]]) -> None:
        """Turn stored look-ahead points y = x + δv into the paper's iterates x, in place.

        Args:
            points: pieces of parameters, each with a copy of its value.
        """
        by_parameter = {id(piece.whole): (piece, point) for piece, point in points}
        for key, optimizer, group in self._nesterov_groups():
            stored, buffers = [], []
            for parameter in group["params"]:
                buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                if id(parameter) in by_parameter and buffer is not None:
                    piece, point = by_parameter[id(parameter)]
                    stored.append(point)
                    buffers.append(as_real(piece.of(buffer)).to(point.device))
            if stored:
                lr, momentum = self._made_with.get(key, (group["lr"], group["momentum"]))
                elastic.undo_look_ahead_(stored, buffers, momentum, float(lr))

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop optimizer state and zero gradients of parameters that start afresh."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
            for optimizer in self._current():
                optimizer.state.pop(parameter, None)

    def _nesterov_groups(self) -> Iterator[tuple[tuple[int, int], Optimizer, dict[str, Any]]]:
        for number, optimizer in enumerate(self._current()):
            if isinstance(optimizer, torch.optim.SGD):
                for position, group in enumerate(optimizer.param_groups):
                    if group["nesterov"]:
                        yield (number, position), optimizer, group
