"""What a rule or a schedule needs of the workers besides its own maths.

Its maths are pure. If it depends on what one worker alone knows, it brings a companion along. The
companion tells the others with every exchange, in fields of the header, and hears what all say. So
all workers draw the same conclusion from the same words; see base.py, [Note: when schedules react].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Said = Mapping[str, Any]
"""What one worker said of itself, by the names of fields."""


@dataclass(frozen=True)
class WorkerView:
    """What a companion may know of its worker; by default, of one that trains alone."""

    participants: Sequence[Sequence[int]] = ((0,),)
    """Places, in what all say, of the workers that take part in exchanges as one. That is a worker
    by itself, or those of a group."""
    participant: int = 0
    """The number of the one that this worker is in."""
    learning_rate: Callable[[], float] = lambda: 0.0
    """The largest learning rate of this worker now."""


class Companion:
    """Says what its worker alone knows, and hears what all others do; does nothing by default.

    Attributes:
        fields: names of what it says, and the kind of each: int (of 64 bits), float or bool. No two
            companions of a training run may have a name in common.
    """

    fields: Mapping[str, type] = {}

    def forget(self) -> None:
        """Begin as if there had been no step yet."""

    def observe(self, output: object) -> bool:
        """Take note of what a training step has returned; whether what is needed is there."""
        return True

    def announce(self) -> Said:
        """What this worker says with its next exchange: a value of every field."""
        return {}

    def hear(self, said: Sequence[Said]) -> None:
        """Draw the conclusion that all workers draw, from what each said, in rank order."""

    def share(self, share: float) -> float:
        """What takes the place of ``share``, the multiple of x - c that a rule lets workers add.

        Asked of rules whose workers restart, when an exchange begins.
        """
        return share

    def resets_to_center(self) -> bool:
        """Whether workers that are pulled restart with the exchange that begins; asked once."""
        return False

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`shared_state` and :meth:`own_state`.

        Args:
            shared: equal on all workers.
            own: None where this worker starts afresh.
        """
