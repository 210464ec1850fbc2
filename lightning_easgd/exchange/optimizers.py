"""What an exchange needs of a worker's optimizers: rates, look-ahead points, a clean restart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import elastic
from lightning_easgd.center.flat import as_reals, without_collection
from lightning_easgd.center.slices import ParameterSlice


class LocalOptimizers:
    """The optimizers of one worker, read at each use because groups may be added while training.

    Args:
        current: gives the optimizers.
    """

    def __init__(self, current: Callable[[], Sequence[Optimizer]]) -> None:
        self.current = current
        self._made_with: dict[tuple[int, int], tuple[Any, Any]] = {}

    def learning_rates(self) -> dict[int, float]:
        """The current learning rate η of each parameter, by the parameter's identity."""
        return {id(parameter): lr for lr, parameters in self._groups() for parameter in parameters}

    def largest_learning_rate(self) -> float:
        """The largest η of any parameter; 0 if there is none."""
        return max((lr for lr, parameters in self._groups() if parameters), default=0.0)

    def after_step(self, optimizer: Optimizer) -> None:
        """Remember the learning rate and momentum of the step that ``optimizer`` just took."""
        if not _is_nesterov(optimizer):
            return
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

    @without_collection()
    def undo_look_ahead_(self, points: Iterable[tuple[ParameterSlice, Tensor]]) -> None:
        """Turn stored look-ahead points y = x + δv into the paper's iterates x, in place.

        Args:
            points: slices of parameters, each with a copy of its value.
        """
        groups = list(self._nesterov_groups())
        if not groups:
            return
        by_parameter = {id(slice_.whole): (slice_, point) for slice_, point in points}
        for key, optimizer, group in groups:
            stored, buffers = [], []
            for parameter in group["params"]:
                buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                if id(parameter) in by_parameter and buffer is not None:
                    slice_, point = by_parameter[id(parameter)]
                    stored.append(point)
                    buffers.append(slice_.of(buffer))
            if stored:
                lr, momentum = self._made_with.get(key, (group["lr"], group["momentum"]))
                there = _on(stored[0].device, as_reals(buffers))
                elastic.undo_look_ahead_(stored, there, momentum, float(lr))

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop optimizer state and zero gradients of parameters that start afresh."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
            for optimizer in self.current():
                optimizer.state.pop(parameter, None)

    def _groups(self) -> Iterator[tuple[float, list[Tensor]]]:
        for optimizer in self.current():
            for group in optimizer.param_groups:
                if "lr" in group:
                    yield float(group["lr"]), group["params"]

    def _nesterov_groups(self) -> Iterator[tuple[tuple[int, int], Optimizer, dict[str, Any]]]:
        for number, optimizer in enumerate(self.current()):
            if _is_nesterov(optimizer):
                for position, group in enumerate(optimizer.param_groups):
                    if group["nesterov"]:
                        yield (number, position), optimizer, group


def _is_nesterov(optimizer: Optimizer) -> bool:
    """Whether one of its groups stores look-ahead points."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["nesterov"] for group in optimizer.param_groups
    )


def _on(device: torch.device, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if {tensor.device for tensor in tensors} == {device}:
        return tensors
    return [tensor.to(device) for tensor in tensors]


def require_complete(optimizers: Iterable[Optimizer]) -> None:
    """Make sure that optimizers have all their options after they were given a state.

    Raises:
        KeyError: the state is another kind of optimizer's. Torch notices only at the first step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if missing := getattr(optimizer, "defaults", {}).keys() - group.keys():
                raise KeyError(f"{type(optimizer).__name__} has no {', '.join(sorted(missing))}")
