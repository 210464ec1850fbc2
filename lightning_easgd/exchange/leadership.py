"""Who leads, where workers follow the one with the lowest running training loss.

A worker says its loss in the header of every exchange; by the next one all know who leads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication import Header


class Leadership:
    """Keeps the running training loss of one worker, and who has the lowest of all.

    Args:
        smoothing: s of the running mean l <- s l + (1 - s) loss, in [0, 1); None: nobody leads.
        participants: ranks of workers that take part in exchanges, and lead, as one: each by
            itself, or those of a group, whose loss is the mean over its members.
    """

    def __init__(self, smoothing: float | None, participants: Sequence[Sequence[int]]) -> None:
        self._smoothing = smoothing
        self._participants = participants
        self.forget()

    def forget(self) -> None:
        """Begin as if there had been no step yet; the first participant leads."""
        self.leader = 0
        """The number of the participant that leads."""
        self._running: Tensor | None = None

    def observe(self, output: object) -> bool:
        """A training step has returned ``output``; whether that has a loss, if one is needed.

        The mean begins afresh behind a loss that is not finite. Nothing is copied from the device.
        """
        if self._smoothing is None:
            return True
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return False
        loss = loss.detach().double().mean()
        if self._running is not None:
            mean = torch.lerp(loss, self._running, self._smoothing)
            loss = torch.where(torch.isfinite(self._running), mean, loss)
        self._running = loss
        return True

    def announce(self) -> float:
        """This worker's running loss, for a header; infinite if it is not known."""
        return math.inf if self._running is None else float(self._running)

    def hear(self, headers: Sequence[Header]) -> None:
        """Agree with all others on who leads; of equals who did before, else the first."""
        if self._smoothing is None:
            return
        known = [header.loss if math.isfinite(header.loss) else math.inf for header in headers]
        ranking = [
            (
                sum(known[rank] for rank in ranks) / len(ranks),
                participant != self.leader,
                participant,
            )
            for participant, ranks in enumerate(self._participants)
        ]
        self.leader = min(ranking)[-1]

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint."""
        return {"leader": self.leader}

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {"loss": None if self._running is None else float(self._running)}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """The inverse of :meth:`shared_state` and :meth:`own_state`, as far as they are there."""
        self.forget()
        self.leader = shared.get("leader", 0) % len(self._participants)
        if own.get("loss") is not None:
            self._running = torch.tensor(own["loss"], dtype=torch.float64, device="cpu")
