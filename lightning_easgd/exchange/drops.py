"""When workers that are pulled start again at the center: after a drop of the learning rate.

A learning rate may be what one worker alone knows. So one that saw its own fall says so in the
header of an exchange, and all workers restart with the next one, which they wait for; see
transit.py, [Note: who decides].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_easgd.communication import Header
from lightning_easgd.exchange.optimizers import LocalOptimizers


class LearningRateDrops:
    """Watches the highest learning rate among a worker's parameters, at every exchange.

    Args:
        ratio: the part of its peak since the last restart that is a drop, in (0, 1); None: nothing.
        optimizers: the worker's own.
    """

    def __init__(self, ratio: float | None, optimizers: LocalOptimizers) -> None:
        self._ratio = ratio
        self._optimizers = optimizers
        self.forget()

    def forget(self) -> None:
        """Begin as if there had been no exchange yet."""
        self._agreed = False
        self._peak = 0.0

    def take(self) -> bool:
        """An exchange has begun: whether workers restart with it, which they then did."""
        agreed = self._agreed
        if agreed:
            self.forget()
        return agreed

    def announce(self) -> bool:
        """Whether this worker's rate has fallen, and no restart is agreed on yet; for a header."""
        if self._ratio is None:
            return False
        rate = self._optimizers.largest_learning_rate()
        self._peak = max(self._peak, rate)
        return not self._agreed and self._peak > 0 and rate <= self._ratio * self._peak

    def hear(self, headers: Sequence[Header]) -> None:
        """Agree with all others on what their headers announce."""
        self._agreed |= any(header.restart for header in headers)

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint."""
        return {"agreed": self._agreed}

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {"peak": self._peak}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """The inverse of :meth:`shared_state` and :meth:`own_state`, as far as they are there."""
        self._agreed = shared.get("agreed", False)
        self._peak = own.get("peak", 0.0)
