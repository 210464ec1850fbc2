"""What a schedule is: a value that follows training, and is the same on all workers.

[Note: when schedules react] What one worker measures is known to no other. It travels in the header
of its next exchange, and counts from the exchange after that on. There all workers have read all
headers. So all schedules see the same and say the same, even if sums arrive late.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_easgd.schedules.companion import Companion, Said, WorkerView


@dataclass(frozen=True)
class TrainingLength:
    """How long training is expected to take, in optimizer steps; equal on all workers."""

    steps: int | None = None
    """From first to last, those before a checkpoint included; None: there is no known end."""
    epoch_steps: int | None = None
    """Of an epoch; None if epochs differ, or have no known end."""

    @classmethod
    def of_all(cls, workers: Sequence[TrainingLength]) -> TrainingLength:
        """As the worker that takes most steps knows it; of none, if one does not know."""
        return cls(
            _most([worker.steps for worker in workers]),
            _most([worker.epoch_steps for worker in workers]),
        )


def _most(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None


@dataclass(frozen=True)
class Durations:
    """What one worker measured, in whole microseconds; 0 where it is not known."""

    step: int = 0
    """An optimizer step, data and all, while nothing is under way."""
    exchange: int = 0
    """An exchange, from its start to the arrival of the sums."""
    cost: int = 0
    """By how much an exchange lengthens the steps that it hides behind; below 0 by chance only."""


@dataclass(frozen=True)
class Observation:
    """What the headers of an exchange told; equal on all workers.

    Letters: p workers, x^i a worker before its pull, c the center, m = (1/p) Σ_i x^i their mean.
    Workers whose weights are not finite do not count.
    """

    durations: Sequence[Durations] = ()
    """Of each worker, in rank order."""
    distance: float | None = None
    """sqrt((1/p) Σ_i ‖x^i - c‖²) / ‖c‖; None but at the end of a round, when each fragment of the
    model had its turn."""
    variance: float | None = None
    """(1/p) Σ_i ‖x^i - m‖² of the round before, where a schedule reads it; else None."""
    lr: float = 0.0
    """The largest learning rate of a worker, where variance is read."""
    said: Sequence[Said] = ()
    """What companions said of each worker whose weights are finite, in rank order."""


class Schedule(ABC):
    """The value of a parameter after so many optimizer steps.

    It depends on the step, and if it is adaptive on what all workers observed. It must not depend
    on what one worker alone knows. Public attributes are options, by which workers are compared.

    Attributes:
        of: names of the parameters that it can set; empty: any.
        reads_variance: whether observations have the variance across workers, which costs a norm.
    """

    of: ClassVar[tuple[str, ...]] = ()
    reads_variance: ClassVar[bool] = False

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value; checked once against what its parameter allows."""

    @abstractmethod
    def at(self, step: int) -> float:
        """The value after ``step`` optimizer steps; changes nothing."""

    def begin(self, training: TrainingLength) -> None:  # noqa: B027
        """Learn how long training takes; before its first step, and again when it resumes.

        Raises:
            ValueError: the schedule needs to know, and it is not known.
        """

    def companions(self, worker: WorkerView) -> list[Companion]:
        """What the schedule wants to observe besides.

        What they say is in :attr:`~lightning_easgd.schedules.Observation.said`.

        Called where training is set up, and sooner to know the names of their fields, which must
        not depend on the worker.

        Args:
            worker: what they may know of the worker that they are for.
        """
        return []

    def limit(self, most: float) -> None:  # noqa: B027
        """Learn what is stable; an adaptive schedule stays at or below it."""

    def observe(self, seen: Observation) -> bool:
        """Learn from an exchange; called on all workers at the same one.

        Returns:
            Whether workers must measure durations afresh.
        """
        return False

    def state(self) -> dict[str, Any]:
        """What was learned, for a checkpoint; equal on all workers."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """The inverse of :meth:`state`."""

    def __repr__(self) -> str:
        """Name and options."""
        options = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        text = ", ".join(f"{k}={v}" for k, v in options.items() if v is not None)
        return f"{type(self).__name__}({text})"


ScalarOrSchedule = float | Callable[[int], float] | Schedule
"""What sets a parameter: a number, a callable of the optimizer step, or a schedule."""


class Schedules:
    """All schedules of a training run, asked together.

    Args:
        named: by the parameter that each sets.
    """

    def __init__(self, named: Mapping[str, Schedule]) -> None:
        self._named = named

    @property
    def adaptive(self) -> bool:
        """Whether one observes anything."""
        kinds = {type(schedule) for schedule in self._named.values()}
        return any(kind.observe is not Schedule.observe for kind in kinds)

    def companions(self, worker: WorkerView) -> list[Companion]:
        """As of Schedule."""
        return [each for s in self._named.values() for each in s.companions(worker)]

    @property
    def read_variance(self) -> bool:
        """Whether one reads the variance across workers."""
        return any(schedule.reads_variance for schedule in self._named.values())

    def begin(self, training: TrainingLength) -> None:
        """As of Schedule."""
        for schedule in self._named.values():
            schedule.begin(training)

    def observe(self, seen: Observation) -> bool:
        """As of Schedule; whether one of them wants durations to be measured afresh."""
        told = [schedule.observe(seen) for schedule in self._named.values()]
        return any(told)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; equal on all workers."""
        return {
            name: {"kind": type(schedule).__name__, "state": schedule.state()}
            for name, schedule in self._named.items()
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`; a schedule of another kind than was saved starts afresh."""
        for name, schedule in self._named.items():
            if saved.get(name, {}).get("kind") == type(schedule).__name__:
                schedule.load_state(saved[name]["state"])
