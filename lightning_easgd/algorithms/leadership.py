"""Who leads, where workers follow the one with the lowest running training loss.

A worker says its loss with every exchange; by the next one all know who leads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.schedules.companion import Companion, Said, WorkerView


class Leadership(Companion):
    """Keeps the running training loss of one worker, and who has the lowest of all.

    Args:
        smoothing: s of the running mean l <- s l + (1 - s) loss, in [0, 1).
        worker: the participants among whom one leads; the loss of a group is the mean over its
            members.
    """

    fields: Mapping[str, type] = {"loss": float}

    def __init__(self, smoothing: float, worker: WorkerView) -> None:
        self._smoothing = smoothing
        self._worker = worker
        self.forget()

    @override
    def forget(self) -> None:
        """Begin as if there had been no step yet; the first participant leads."""
        self.leader = 0
        """The number of the participant that leads."""
        self._running: Tensor | None = None

    @override
    def observe(self, output: object) -> bool:
        """Whether ``output`` has a loss.

        The mean begins afresh behind a loss that is not finite. Nothing is copied from the device.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return False
        loss = loss.detach().double().mean()
        if self._running is not None:
            mean = torch.lerp(loss, self._running, self._smoothing)
            loss = torch.where(torch.isfinite(self._running), mean, loss)
        self._running = loss
        return True

    @override
    def announce(self) -> Said:
        """This worker's running loss; infinite if it is not known."""
        return {"loss": math.inf if self._running is None else float(self._running)}

    @override
    def hear(self, said: Sequence[Said]) -> None:
        """Agree with all others on who leads; of equals who did before, else the first."""
        known = [each["loss"] if math.isfinite(each["loss"]) else math.inf for each in said]
        ranking = [
            (
                sum(known[place] for place in places) / len(places),
                participant != self.leader,
                participant,
            )
            for participant, places in enumerate(self._worker.participants)
        ]
        self.leader = min(ranking)[-1]

    @override
    def share(self, share: float) -> float:
        """All of it where this worker leads, else nothing."""
        return share if self.leader == self._worker.participant else 0.0

    @override
    def shared_state(self) -> dict[str, Any]:
        return {"leader": self.leader}

    @override
    def own_state(self) -> dict[str, Any]:
        return {"loss": None if self._running is None else float(self._running)}

    @override
    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        self.forget()
        self.leader = shared["leader"] % len(self._worker.participants)
        if own is not None and own["loss"] is not None:
            self._running = torch.tensor(own["loss"], dtype=torch.float64, device="cpu")
