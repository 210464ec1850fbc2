"""Lightning's own collectives, through the workers' group while a fit lasts.

[Note: alone] An exception may be one worker's only, and the others know nothing of it. Whatever
Lightning does then (its callbacks may save a checkpoint) happens without the others: no collective
runs, and what is saved is the center as this worker knows it.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_easgd.communication import Phase, WorkerGroup, monitored

_AFTER_A_SAVE = "Trainer.save_checkpoint"
"""Lightning's name of the barrier."""


class Progress(Protocol):
    """Where in training the worker is that comes to a collective."""

    @property
    def alone(self) -> bool:
        """Whether it handles an exception that the others may know nothing of."""

    def await_others(self, phase: Phase) -> None:
        """Wait for the others, where they may come later."""

    def where(self) -> str:
        """Where it is, in words."""


class SettingUp:
    """The progress of a worker whose fit is not set up yet."""

    alone = False

    def await_others(self, phase: Phase) -> None:
        """All come at once."""

    def where(self) -> str:
        """Where it is, in words."""
        return "while training is set up"


class Collectives:
    """Lightning's, of all workers: they fail when one is missing; see also [Note: alone].

    Args:
        group: all workers.
        progress: of this worker.
    """

    def __init__(self, group: WorkerGroup, progress: Progress) -> None:
        self.group = group
        """All workers."""
        self._progress = progress

    def together(self, phase: Phase) -> bool:
        """Whether all workers are here for a collective of Lightning's; none is if not."""
        self._progress.await_others(phase)
        return not self._progress.alone

    def barrier(self, name: object = None) -> None:
        """As Strategy.barrier."""
        # Workers that saved have just met. The checkpoint does not count a header sent after it.
        met = name == _AFTER_A_SAVE
        if (not self._progress.alone) if met else self.together(Phase.BARRIER):
            monitored.barrier(self.group, self._what("barrier"))

    def broadcast(self, value: Any, source: int) -> Any:
        """As Strategy.broadcast."""
        if not self.together(Phase.BROADCAST):
            return value
        return monitored.broadcast(self.group, value, source, self._what("broadcast"))

    def reduce(self, value: Any, operation: Any) -> Any:
        """As Strategy.reduce."""
        if self._progress.alone or not isinstance(value, Tensor):
            return value
        self.together(Phase.REDUCTION)
        return monitored.reduce_(self.group, value, operation, self._what("reduction"))

    def before_gathering(self) -> None:
        """Wait for all; Lightning then gathers itself, so that gradients can flow back."""
        self.together(Phase.GATHERING)
        monitored.barrier(self.group, self._what("gathering"))

    def _what(self, collective: str) -> str:
        """A collective of Lightning's in words, and where in training it is."""
        return f"Lightning's {collective} {self._progress.where()}"
