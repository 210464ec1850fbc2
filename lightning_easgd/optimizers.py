"""What an exchange needs of a worker's optimizers: rates, look-ahead points, a clean restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import elastic
from lightning_easgd.flat import as_real


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

    def undo_look_ahead_(self, points: Mapping[int, Tensor]) -> None:
        """Turn stored look-ahead points y = x + δv into the paper's iterates x, in place.

        Args:
            points: a copy of each parameter's value, by the parameter's identity.
        """
        for key, optimizer, group in self._nesterov_groups():
            moving = {
                parameter: as_real(optimizer.state[parameter]["momentum_buffer"])
                for parameter in group["params"]
                if id(parameter) in points
                and optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
            }
            if moving:
                lr, momentum = self._made_with.get(key, (group["lr"], group["momentum"]))
                stored = [points[id(parameter)] for parameter in moving]
                elastic.undo_look_ahead_(stored, list(moving.values()), momentum, float(lr))

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
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
