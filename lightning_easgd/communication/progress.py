"""How far a worker is, as its training thread says it and its sign of life tells the others.

[Note: progress] A worker may be alive and stuck: in storage, in a loader, in a deadlock. So others
wait for progress, not for life. Every batch, every optimizer step and every collective raises a
count. This costs the training thread one assignment. The thread of the sign of life notices how
long the count has stood.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """How far this worker is; written by its training thread alone."""

    count: int = 0
    """Rises with every batch, optimizer step and collective."""
    step: int = 0
    """Optimizer steps taken."""
    place: str = "in the set-up of training"
    """Where it is, in words."""
    waits_for: str = ""
    """What it waits for together with others, in words; empty while it does not."""

    def enter(self, place: str) -> None:
        """Say where this worker is from now on."""
        self.count += 1
        self.place = place

    def take_step(self, step: int) -> None:
        """Say that this worker has taken ``step`` optimizer steps."""
        self.count += 1
        self.step = step

    def begin_to_wait(self, what: str) -> None:
        """Say that this worker waits, until :meth:`go_on`."""
        self.count += 1
        self.waits_for = what

    def go_on(self) -> None:
        """Say that this worker does not wait any longer."""
        self.count += 1
        self.waits_for = ""
