"""What a checkpoint holds besides what Lightning saves: two records, each of plain data.

They are written as dictionaries of what ``torch.load(weights_only=True)`` reads, one entry a field.
What a field holds is the state of one part, which alone knows what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from typing_extensions import Self

FORMAT = 3
"""Version of the layout, and of the fields below; any change of them is another one, but for a
field that has a default."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Fields that are all there, or an error that names those that are not."""

    def plain(self) -> dict[str, Any]:
        """The fields, by name."""
        return dict(vars(self))

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`plain`; what else is there is left out.

        Raises:
            ValueError: a field is missing.
        """
        needed = [each.name for each in fields(cls) if each.default_factory is MISSING]
        if missing := [name for name in needed if name not in saved]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        names = [each.name for each in fields(cls)]
        return cls(**{name: saved[name] for name in names if name in saved})


@dataclass(frozen=True, kw_only=True)
class SharedState(Record):
    """What all workers hold alike: the entry of the main file."""

    save: str
    """Names the save; so do the workers' files."""
    workers: int
    """How many saved."""
    parts: list[Any]
    """Length and digest of each worker's file; empty where one worker alone saved. Of workers at
    their own pace, of worker 0's: the files of the others have theirs."""
    own: dict[str, Any] | None
    """Of one worker alone: its WorkerState, as it has no file."""

    begun: bool
    """Whether training had; before that, the module is the center."""
    clock: int
    """Optimizer steps taken."""
    tau: int
    """τ in force."""
    next_due: int
    """The next step that begins with an exchange."""
    fragment_index: int
    """Which fragment the next exchange is of."""
    exchanged: tuple[int, int] | None
    """When the latest exchange began, and how many cohorts were in it."""
    owed: tuple[int, int, int] | None
    """When workers go on from the center, with which fragments and how many cohorts."""
    at_the_end: bool
    """Whether it was saved at the end of training; see ending.py."""

    cohorts: list[list[str]]
    """Names of the parameters that came to take part together."""
    joined: list[int]
    """How many cohorts take part; and of the parameters that are exchanged often, if there are."""
    exact: dict[str, Any]
    """The center's values that those of the main file are not, or not in full precision."""
    averaged: dict[str, Any] | None
    """The center where its running average is delivered, and how often it has moved."""
    rule_state: dict[str, Any]
    """What the rule keeps of the center, by fragment."""
    algorithm: str
    """Which rule keeps it."""

    schedules: dict[str, Any]
    """What each has learned."""
    consensus: dict[str, Any]
    """Distances and variance of the round that has begun."""
    agreement: dict[str, Any]
    """What companions of rule and schedules have agreed on."""
    groups: list[list[list[int]]]
    """Ranks of all groups, level by level from the outermost inward."""
    tied: bool
    """Whether each has a center of its own."""


@dataclass(frozen=True, kw_only=True)
class WorkerState(Record):
    """What one worker alone holds: its file."""

    save: str
    """To which the file belongs."""
    worker: int
    """Its rank."""
    checkpoint: dict[str, Any]
    """Its own of what Lightning saves: optimizers, schedulers, loops, callbacks. Worker 0's is the
    main file's."""

    weights: dict[str, Any]
    """The values of its module that the main file does not have; see own_values.py."""
    look_ahead: list[Any]
    """Rates with which Nesterov optimizers made their points."""
    residual: dict[str, Any]
    """What compression owes the center."""
    starts: dict[str, Any]
    """Where it stood after its latest exchange, if its rule counts differences from there."""
    levels: list[dict[str, Any]]
    """The centers of its groups, from the outermost inward."""
    agreement: dict[str, Any]
    """What companions of rule and schedules know of this worker."""
    telemetry: dict[str, Any]
    """Its counters."""
    random: dict[str, Any]
    """Its random generators."""
    pace: dict[str, Any] = field(default_factory=dict)
    """Its own of PACE, where each worker has its own pace; else all have that of SharedState."""


PACE = ("begun", "clock", "tau", "next_due", "schedules")
"""Of SharedState, what a worker at its own pace has by itself."""
