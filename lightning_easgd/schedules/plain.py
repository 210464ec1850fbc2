"""Schedules that follow the optimizer step alone."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import ClassVar

from typing_extensions import override

from lightning_easgd.schedules.base import ScalarOrSchedule, Schedule, TrainingLength
from lightning_easgd.schedules.checks import is_number, require, require_count

_STEPS = "optimizer steps"

Check = Callable[[object], float]
"""Returns an allowed value as a number; raises ValueError for others."""


class Constant(Schedule):
    """A number."""

    def __init__(self, value: float) -> None:
        self._value = value

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self._value, self._value

    @override
    def at(self, step: int) -> float:
        return self._value

    @override
    def __repr__(self) -> str:
        return str(self._value)


class Function(Schedule):
    """A callable of the optimizer step, whose values are checked one by one."""

    def __init__(self, function: Callable[[int], float], check: Check) -> None:
        self._function = function
        self._check = check

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self.at(0), self.at(0)

    @override
    def at(self, step: int) -> float:
        return self._check(self._function(step))

    @override
    def __repr__(self) -> str:
        return "callable"


def as_schedule(name: str, value: ScalarOrSchedule, check: Check) -> Schedule:
    """The schedule that ``value`` is or means; a copy, so that no two runs share what one learns.

    Args:
        name: of the parameter that it sets.
        value: a number, a callable of the optimizer step, or a schedule.
        check: what is allowed; of a schedule, both bounds must be.

    Raises:
        ValueError: the value is not allowed; what a callable returns is checked when it does.
    """
    if isinstance(value, Schedule):
        if value.of and name not in value.of:
            raise ValueError(
                f"{name}={value} is not possible: {type(value).__name__} sets"
                f" {' or '.join(value.of)}. Give {name} a number, a callable of the optimizer step"
                " or another schedule."
            )
        for bound in value.bounds:
            check(bound)
        return copy.deepcopy(value)
    if callable(value):
        return Function(value, check)
    return Constant(check(value))


class Ramp(Schedule):
    """From one value to another within some steps; then it stays there.

    With u = min(1, t / steps) after t optimizer steps, or after a ``fraction`` of training.

    Args:
        start: the value at first.
        stop: the value in the end.
        steps: how many it takes, in optimizer steps.
        fraction: of training that it takes, in (0, 1]; all of it if neither is given. A run that
            resumes with another length goes on with the value that belongs there.

    Raises:
        ValueError: a value is no number, or out of range; at set-up, a fraction is wanted of a
            training without a known end.
    """

    def __init__(
        self,
        start: float,
        stop: float,
        *,
        steps: int | None = None,
        fraction: float | None = None,
    ) -> None:
        self.start = _require_number("start", start)
        self.stop = _require_number("stop", stop)
        if steps is not None and fraction is not None:
            raise ValueError(
                f"Got steps={steps!r} and fraction={fraction!r}, which both say how long the"
                " schedule takes. Leave one of them out."
            )
        self.steps = None if steps is None else require_count("steps", steps, _STEPS)
        self.fraction = None
        if steps is None:
            self.fraction = 1.0 if fraction is None else fraction
            inside = is_number(self.fraction) and 0 < self.fraction <= 1
            require("fraction", self.fraction, "a part of training, in (0, 1]", inside)
        self._length = math.inf if steps is None else steps

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.stop), max(self.start, self.stop)

    @override
    def begin(self, training: TrainingLength) -> None:
        if self.fraction is not None:
            self._length = self.fraction * _known_end(self, training)

    @override
    def at(self, step: int) -> float:
        if step >= self._length:
            return self.stop
        least, most = self.bounds
        return min(max(self._between(step / self._length), least), most)

    @abstractmethod
    def _between(self, progress: float) -> float:
        """The value at u = ``progress``, in [0, 1)."""


class Linear(Ramp):
    """start + (stop - start) u, in equal steps from start to stop; see Ramp for the arguments."""

    @override
    def _between(self, progress: float) -> float:
        return self.start + (self.stop - self.start) * progress


class Cosine(Ramp):
    """stop + (start - stop) (1 + cos πu) / 2, slow at both ends; see Ramp for the arguments.

    Loshchilov, Hutter 2017, "SGDR", arXiv:1608.03983, eq. 5, of one period.
    """

    @override
    def _between(self, progress: float) -> float:
        return self.stop + (self.start - self.stop) * (1 + math.cos(math.pi * progress)) / 2


class Exponential(Ramp):
    """start (stop / start)^u, by the same factor at each step; see Ramp for the arguments.

    Raises:
        ValueError: as Ramp, and if start or stop is not positive.
    """

    def __init__(
        self,
        start: float,
        stop: float,
        *,
        steps: int | None = None,
        fraction: float | None = None,
    ) -> None:
        super().__init__(start, stop, steps=steps, fraction=fraction)
        for name, value in {"start": self.start, "stop": self.stop}.items():
            require(name, value, "a positive number; an exponential does not reach 0", value > 0)

    @override
    def _between(self, progress: float) -> float:
        return float(self.start * (self.stop / self.start) ** progress)


class Steps(Schedule):
    """One value after the other, each from a step on.

    Args:
        values: in their order.
        steps: from which optimizer step on each but the first holds, ascending.
        fractions: the same as fractions of training, in (0, 1); instead of ``steps``.

    Raises:
        ValueError: values are no numbers, or not one more than steps or fractions, or these do not
            ascend; at set-up, fractions are wanted of a training without a known end.
    """

    def __init__(
        self,
        values: Sequence[float],
        *,
        steps: Sequence[int] | None = None,
        fractions: Sequence[float] | None = None,
    ) -> None:
        self.values = tuple(_require_number("values", value) for value in values)
        if (steps is None) == (fractions is None):
            raise ValueError(
                f"Got steps={steps!r} and fractions={fractions!r}. Give one of them: from when on"
                " each value but the first holds."
            )
        self.steps = steps and tuple(require_count("steps", step, _STEPS) for step in steps)
        self.fractions = fractions and tuple(fractions)
        for part in self.fractions or ():
            inside = is_number(part) and 0 < part < 1
            require("fractions", part, "parts of training, in (0, 1)", inside)
        self._edges: Sequence[float] = self.steps or (math.inf,)
        given = tuple(self.steps or self.fractions or ())
        if len(given) != len(self.values) - 1 or list(given) != sorted(set(given)) or not given:
            raise ValueError(
                f"Got {len(self.values)} values and {given} as where they begin. Allowed: at least"
                " two values, and one place less, in ascending order."
            )

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    @override
    def begin(self, training: TrainingLength) -> None:
        if self.fractions:
            end = _known_end(self, training)
            self._edges = tuple(fraction * end for fraction in self.fractions)

    @override
    def at(self, step: int) -> float:
        return self.values[bisect_right(self._edges, step)]


class Anneal(Schedule):
    """A strength that rises as Parle's: start (1 + 1 / (2B))^⌊t / L⌋, at most ``stop``.

    With B batches in an epoch it grows by a factor of e^(1/2) every L epochs. So workers are free
    at first, and close together in the end.

    Chaudhari et al. 2017, "Parle: parallelizing stochastic gradient descent", arXiv:1707.00424:
    its scoping of ρ, in the form, and with the numbers, of the authors' code.

    Args:
        start: the value at first, positive; as ``rho``, Parle's ρ.
        stop: the value that it stops at.
        batches: B, in optimizer steps; None: those of an epoch.
        every: L, in optimizer steps.

    Raises:
        ValueError: a value is out of range; at set-up, B is that of an epoch without a known end.
    """

    of: ClassVar[tuple[str, ...]] = ("rho", "alpha", "beta")

    def __init__(
        self, start: float, stop: float = 10.0, *, batches: int | None = None, every: int = 25
    ) -> None:
        self.start = _require_number("start", start)
        self.stop = _require_number("stop", stop)
        if not 0 < self.start <= self.stop:
            raise ValueError(
                f"start={start!r} and stop={stop!r} are not allowed: the strength rises. Allowed:"
                " 0 < start <= stop."
            )
        self.batches = None if batches is None else require_count("batches", batches, _STEPS)
        self.every = require_count("every", every, _STEPS)
        self._batches: float = self.batches or math.inf

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self.start, self.stop

    @override
    def begin(self, training: TrainingLength) -> None:
        if self.batches is not None:
            return
        if training.epoch_steps is None:
            raise ValueError(
                f"{self} rises by the number of optimizer steps in an epoch, and that is not known"
                " here: the data has no length, or optimization is manual. Give batches."
            )
        self._batches = training.epoch_steps

    @override
    def at(self, step: int) -> float:
        growth = (step // self.every) * math.log1p(1 / (2 * self._batches))
        if growth >= math.log(self.stop / self.start):
            return self.stop
        return min(self.start * math.exp(growth), self.stop)


def _known_end(schedule: Schedule, training: TrainingLength) -> int:
    if training.steps is None:
        raise ValueError(
            f"{schedule} takes a fraction of training, and this training has no known end: it has"
            " no limit, its data has no length, its gradient accumulation changes, or optimization"
            " is manual. Set Trainer(max_steps=...), or give the schedule steps."
        )
    return max(1, training.steps)


def _require_number(name: str, value: float) -> float:
    require(name, value, "finite numbers", is_number(value))
    return value
