"""The period that is found by measuring: the smallest τ behind which an exchange hides.

The cost of an exchange is a small difference between long times that vary. So τ is chosen again
when more times are known. It falls to half at most at a time: a τ that is too small costs time, and
one that is too large for a while costs little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_easgd.schedules.base import Durations, Observation, ScalarOrSchedule, Schedule
from lightning_easgd.schedules.checks import require_count
from lightning_easgd.schedules.often import fewer_or_smaller, multiple_of

ENOUGH_ROUNDS = 16
"""After which what was measured of them is worth a choice."""

_FIRST_TAU = 10
_ALLOWED_COST = 0.02
_CHANGE = 0.25
_FIRST_ROUNDS, _MORE = 3, 4


class Auto:
    """τ is to be found by measuring: the smallest period behind which an exchange hides.

    ``tau="auto"`` is ``tau=Auto()``. The bounds are by default what the paper tried (section 5).

    Args:
        min: the smallest τ that may be chosen, in optimizer steps.
        max: the largest τ that may be chosen, in optimizer steps.

    Raises:
        ValueError: one is no whole number of at least 1, or ``max`` is below ``min``.
    """

    def __init__(self, *, min: int = 1, max: int = 64) -> None:
        self.min = require_count("min", min, "optimizer steps for tau")
        self.max = require_count("max", max, "optimizer steps for tau")
        self.within(1)

    def __repr__(self) -> str:
        """As it is written."""
        return f"Auto(min={self.min}, max={self.max})"

    @classmethod
    def of(cls, tau: object) -> Auto | None:
        """What "auto" stands for; None if τ is set by something else."""
        if isinstance(tau, Auto):
            return tau
        return cls() if isinstance(tau, str) and tau == "auto" else None

    def within(self, fragments: int, often: int = 1) -> tuple[int, int]:
        """The smallest and the largest τ that is a multiple of ``fragments`` times ``often``.

        Raises:
            ValueError: there is none.
        """
        parts = fragments * often
        least, most = parts * math.ceil(self.min / parts), parts * (self.max // parts)
        if most < least:
            raise ValueError(
                f"{self} leaves no period that is a multiple of {multiple_of(fragments, often)}."
                f" Raise max, or lower min, or take {fewer_or_smaller(fragments, often)}."
            )
        return least, most


Tau = ScalarOrSchedule | Auto | Literal["auto", "even"]
"""What sets the communication period."""


class AutomaticPeriod(Schedule):
    """The smallest τ at which an exchange hides behind training, as far as one can.

    The sums arrive within τ steps, and what cannot hide takes at most 2 % of the time. All workers
    choose the same τ from what all have measured: the slowest worker's step, and the exchange as
    the last worker to begin it sees it. They choose again when either changes by more than a
    quarter.

    Args:
        within: the bounds of τ.
        fragments: parts of the model, one of which is exchanged every τ / fragments steps.
        often: of which those steps are a multiple.
        log: told what was chosen, and why.

    Raises:
        ValueError: no multiple of ``fragments`` times ``often`` lies within the bounds.
    """

    of: ClassVar[tuple[str, ...]] = ("tau",)

    def __init__(
        self,
        within: Auto | None = None,
        *,
        fragments: int = 1,
        often: int = 1,
        log: Callable[[str], None] = print,
    ) -> None:
        self._fragments, self._often = fragments, often
        self._bounds = (within or Auto()).within(fragments, often)
        self._log = log
        self._chosen_for = Durations()
        self._rounds = 0
        self._tau = self._allowed(_FIRST_TAU / fragments)

    @override
    def __repr__(self) -> str:
        return f"auto, from {self._bounds[0]} to {self._bounds[1]}"

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self._bounds

    @override
    def at(self, step: int) -> float:
        return self._tau

    @override
    def observe(self, seen: Observation) -> bool:
        known = [durations for durations in seen.durations if durations.step and durations.exchange]
        if not known:
            return False
        self._rounds += 1
        found = Durations(
            step=max(durations.step for durations in known),
            exchange=min(durations.exchange for durations in known),
            cost=max(0, sum(durations.cost for durations in known) // len(known)),
        )
        if _are_worth_a_choice(self._rounds):
            self._choose(found)
        changed = self._rounds > ENOUGH_ROUNDS and self._changed(found)
        if changed:
            self._rounds = 0
        return changed

    @override
    def state(self) -> dict[str, Any]:
        return {"tau": self._tau, "rounds": self._rounds, "chosen_for": vars(self._chosen_for)}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._tau = self._allowed(state["tau"] / self._fragments)
        self._rounds = state["rounds"]
        self._chosen_for = Durations(**state["chosen_for"])

    def _changed(self, found: Durations) -> bool:
        before = self._chosen_for
        longer = abs(found.exchange - before.exchange)
        return (
            abs(found.step - before.step) > _CHANGE * before.step
            # An exchange that is much shorter than a step may be even shorter.
            or longer > _CHANGE * max(before.exchange, before.step)
        )

    def _choose(self, found: Durations) -> None:
        free = self._allowed(max(_steps_between(found)))
        tau = max(free, self._allowed(self._tau / self._fragments / 2))
        if tau != self._tau or self._chosen_for == Durations():
            self._log(self._reason(tau, free, found))
        self._tau, self._chosen_for = tau, found

    def _allowed(self, steps_between: float) -> int:
        return _nearest_period(steps_between, self._fragments, self._bounds, often=self._often)

    def _reason(self, tau: int, free: int, found: Durations) -> str:
        behind, rarely = _steps_between(found)
        hidden = tau // self._fragments >= behind
        return (
            f"tau=auto: {self._tau} -> {tau}. A step takes {found.step / 1e3:.1f} ms and an"
            f" exchange {found.exchange / 1e3:.1f} ms, which hides behind {behind} step(s); it"
            f" lengthens them by {found.cost / 1e3:.1f} ms, which is {_ALLOWED_COST:.0%} of"
            f" {rarely}."
            + ("" if hidden else f" Exchanges do not hide: max={tau} is smaller.")
            + (f" It falls to {free} by halves." if free < tau else "")
        )


def smallest_period(
    found: Durations, fragments: int, bounds: tuple[int, int], *, often: int = 1
) -> int:
    """The smallest τ at which an exchange hides behind training, as far as one can.

    Args:
        found: what a step and an exchange take.
        fragments: parts of the model, one of which is exchanged every τ / fragments steps.
        bounds: the smallest and the largest τ allowed.
        often: of which those steps are a multiple.

    Raises:
        ValueError: no multiple of ``fragments`` times ``often`` lies within the bounds.
    """
    least, most = bounds
    within = Auto(min=least, max=most).within(fragments, often)
    return _nearest_period(max(_steps_between(found)), fragments, within, often=often)


def _steps_between(found: Durations) -> tuple[int, int]:
    """Behind how many steps an exchange hides, and of how many its cost is small."""
    behind = max(1, math.ceil(found.exchange / found.step))
    return behind, math.ceil(found.cost / (_ALLOWED_COST * found.step))


def _nearest_period(
    steps_between: float, fragments: int, bounds: tuple[int, int], *, often: int
) -> int:
    least, most = bounds
    return min(max(fragments * often * math.ceil(steps_between / often), least), most)


def _are_worth_a_choice(rounds: int) -> bool:
    """After the first few, and whenever four times as many have said what an exchange costs."""
    while rounds > ENOUGH_ROUNDS and rounds % _MORE == 0:
        rounds //= _MORE
    return rounds in (_FIRST_ROUNDS, ENOUGH_ROUNDS)
