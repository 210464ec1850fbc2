"""When workers that are pulled start again at the center: after a drop of the learning rate.

Perhaps one worker alone knows its learning rate. So a worker that saw its own fall says so with an
exchange. All workers restart with the next exchange, and wait for its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from lightning_easgd.schedules.companion import Companion, Said


class LearningRateDrops(Companion):
    """Watches the highest learning rate among a worker's parameters, at every exchange.

    Args:
        ratio: the part of its peak since the last restart that is a drop, in (0, 1).
        learning_rate: the highest of this worker, now.
    """

    fields: Mapping[str, type] = {"reset": bool}

    def __init__(self, ratio: float, learning_rate: Callable[[], float]) -> None:
        self._ratio = ratio
        self._learning_rate = learning_rate
        self.forget()

    @override
    def forget(self) -> None:
        self._agreed = False
        self._peak = 0.0

    @override
    def resets_to_center(self) -> bool:
        agreed = self._agreed
        if agreed:
            self.forget()
        return agreed

    @override
    def announce(self) -> Said:
        """Whether this worker's rate has fallen, and no restart is agreed on yet."""
        rate = self._learning_rate()
        self._peak = max(self._peak, rate)
        fallen = self._peak > 0 and rate <= self._ratio * self._peak
        return {"reset": fallen and not self._agreed}

    @override
    def hear(self, said: Sequence[Said]) -> None:
        self._agreed |= any(each["reset"] for each in said)

    @override
    def shared_state(self) -> dict[str, Any]:
        return {"agreed": self._agreed}

    @override
    def own_state(self) -> dict[str, Any]:
        return {"peak": self._peak}

    @override
    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        self._agreed = shared["agreed"]
        self._peak = 0.0 if own is None else own["peak"]
