"""The period that a server tells each worker, so that unequal ones exchange equally often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_easgd.schedules.base import Schedule

MOST = 8
"""Times the mean period: no worker's is longer, and none is shorter than the mean over it."""


class Even(Schedule):
    """τ as the server says it last, in proportion to how fast this worker is.

    Args:
        mean: of all workers' periods, with which a worker begins.
    """

    of = ("tau",)

    def __init__(self, mean: int = 10) -> None:
        self.mean = mean
        self._told = mean

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return 1, MOST * self.mean

    @override
    def at(self, step: int) -> float:
        return self._told

    def hear(self, tau: int) -> None:
        """Take over what the server says."""
        self._told = tau

    @override
    def state(self) -> dict[str, Any]:
        return {"told": self._told}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._told = state["told"]
