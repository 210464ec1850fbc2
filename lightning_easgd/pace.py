"""The period that is found by measuring: the smallest τ behind which an exchange hides.

[Note: what an exchange costs] Of an exchange, the way of the sum hides behind the τ steps that
follow, if they take as long. What does not hide is the work at both ends: differences, pull, the
center's move, and what the network takes from the processor on the way. That is found by comparing:
rounds with an exchange take longer than as many steps with nothing under way.

Where workers share processors, that is too much: steps with nothing under way are those in which
others wait for their sums, and leave the processors to them. What rounds take more of the
processors is too little: the kernel's work for the network is not in it. If it is less, the middle
of both is the cost.

It is a small difference of long times that vary. So all steps count, not only the latest, and τ is
chosen again as more of them are known. It falls to half at most at a time: one that is too small
costs time, and one that is too large for a while costs little.

[Note: bounds of the cost] Where training and its sums are both the host's, what an exchange takes
is known from itself too, and varies less: what training's own thread did for it, and what the
thread of the sums did. The cost is at least the first. It is at most twice both: they leave out the
kernel's work for the network and emptied caches, and processors that are shared take longer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from lightning_easgd.schedules import Durations, Observation, Schedule, is_number

TAU_MIN, TAU_MAX = 1, 64
"""Where the period is looked for by default: what the paper tried (section 5)."""

_FIRST_TAU = 10
_ALLOWED_COST = 0.02
_UNSEEN = 2.0
_CHANGE = 0.25
_FIRST_ROUNDS, _ENOUGH_ROUNDS, _MORE = 3, 16, 4
_RECENT_STEPS = 64
_OUTLIER = 3.0
_UNSETTLED_STEPS = 3


class Step(NamedTuple):
    """What a step took, in seconds."""

    time: float
    processors: float
    """Of all threads of this process."""


@dataclass
class Total:
    """Steps, added up."""

    steps: int = 0
    time: float = 0.0
    processors: float = 0.0

    def add(self, steps: Sequence[Step]) -> None:
        """Add some more."""
        for step in steps:
            self.steps += 1
            self.time += step.time
            self.processors += step.processors


class Pace:
    """Measures the steps and exchanges of one worker.

    A round is an exchange and the steps up to the next one.

    Args:
        clock: seconds.
        processors: seconds that this process has had of them.
        sums: of these, those that the sums have had in a thread of their own; None: that is not
            known, or what the host does is not what training waits for.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        processors: Callable[[], float] = time.process_time,
        *,
        sums: Callable[[], float] | None = None,
    ) -> None:
        self._clock = clock
        self._processors = processors
        self._sums = sums
        self._worked = self._summed = 0.0
        self._works: deque[float] = deque(maxlen=_ENOUGH_ROUNDS)
        self._sum_works: deque[float] = deque(maxlen=_ENOUGH_ROUNDS)
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)  # idle ones
        self._flights: deque[float] = deque(maxlen=_ENOUGH_ROUNDS)
        self._unsettled = _UNSETTLED_STEPS
        self.restart()
        self.interrupt()

    def restart(self) -> None:
        """Forget what was measured: it holds no longer."""
        for known in (self._recent, self._flights, self._works, self._sum_works):
            known.clear()
        self._idle, self._whole, self._rounds = Total(), Total(), 0
        self._longest = math.inf  # what is longer is something else than a step

    def interrupt(self) -> None:
        """Forget what is being measured: something else than steps takes its time."""
        self._last_end: float | None = None
        self._last_used = 0.0
        self._departure: float | None = None
        self._round: list[Step] | None = None
        self._exchanged = self._idled = False
        self._waited = 0.0

    def wait(self, seconds: float) -> None:
        """The worker stood still."""
        self._waited += seconds

    @contextmanager
    def work(self) -> Iterator[None]:
        """Surrounds what training's own thread does for an exchange."""
        began, waited = self._clock(), self._waited
        yield
        self._worked += self._clock() - began - (self._waited - waited)

    def arrive(self) -> None:
        """The sums that were under way are there."""
        if self._departure is not None:
            self._flights.append(self._clock() - self._departure)
            self._departure = None

    def exchange(self) -> None:
        """An exchange has started in this step; all before it is over."""
        summed = self._summed_since()
        if self._round is not None:
            if not self._idled:
                self._note_idle(self._round[1:])  # the best that is known of idle ones
            self._whole.add(self._round)
            self._rounds += 1
            self._works.append(self._worked)
            self._sum_works.append(summed)
        self._round = None if self._last_end is None else []
        self._exchanged, self._idled = True, False
        if self._recent:
            self._longest = _OUTLIER * statistics.median(self._recent)
        self._worked = 0.0
        self._departure = self._clock()

    def step(self, arrived: Callable[[], bool]) -> None:
        """A step has ended; ``arrived`` says whether the sums under way are there."""
        now, used = self._clock(), self._processors()
        if self._unsettled:
            self._unsettled -= 1
        elif self._last_end is not None:
            took = min(now - self._last_end - self._waited, self._longest)
            self._note(Step(took, used - self._last_used))
        if self._departure is not None and arrived():
            if self._last_end is not None:  # at some moment between then and now
                self._departure += min(now - self._last_end, now - self._departure) / 2
            self.arrive()
        self._last_end, self._last_used = now, used
        self._waited, self._exchanged = 0.0, False

    def durations(self) -> Durations:
        """What is known now."""
        if not self._recent:
            return Durations()
        idle, whole = self._idle, self._whole
        longer = whole.time - whole.steps * idle.time / idle.steps
        busier = whole.processors - whole.steps * idle.processors / idle.steps
        busier *= idle.time / max(idle.processors, 1e-9)
        cost = self._bounded((longer + min(longer, busier)) / 2 / max(1, self._rounds))
        step = statistics.fmean(self._recent)  # no median: it adds up over a round
        exchange = statistics.median(self._flights) if self._flights else 0.0
        return Durations(*(math.ceil(1e6 * seconds) for seconds in (step, exchange, cost)))

    def _bounded(self, cost: float) -> float:
        """What an exchange costs; see [Note: bounds of the cost]."""
        if self._sums is None or not self._works:
            return cost
        work, sums = statistics.median(self._works), statistics.median(self._sum_works)
        return min(max(cost, work), _UNSEEN * (work + sums))

    def _summed_since(self) -> float:
        """Seconds of a processor that the sums have had since the last call."""
        before, self._summed = self._summed, self._sums() if self._sums else 0.0
        return self._summed - before

    def _note(self, step: Step) -> None:
        if self._departure is None and not self._exchanged:
            self._note_idle([step])
            self._idled = True
        if self._round is not None:
            self._round.append(step)

    def _note_idle(self, steps: Sequence[Step]) -> None:
        self._recent.extend(step.time for step in steps)
        self._idle.add(steps)


class AutomaticPeriod(Schedule):
    """The smallest τ at which an exchange hides behind training, as far as one can.

    The sums arrive within τ steps, and what cannot hide takes at most 2 % of the time. It is chosen
    from what all workers measured, by all alike: the slowest worker's step, and the exchange as the
    last to begin it sees it. It is chosen again when either changes by more than a quarter.

    Args:
        tau_min: the smallest τ allowed.
        tau_max: the largest τ allowed.
        fragments: parts of the model, one of which is exchanged every τ / fragments steps.
        log: told what was chosen, and why.

    Raises:
        ValueError: the bounds are no whole numbers, or no multiple of ``fragments`` lies within.
    """

    of: ClassVar[tuple[str, ...]] = ("tau",)

    def __init__(
        self,
        tau_min: int = TAU_MIN,
        tau_max: int = TAU_MAX,
        fragments: int = 1,
        *,
        log: Callable[[str], None] = print,
    ) -> None:
        self._fragments = fragments
        self._bounds = _bounds(tau_min, tau_max, fragments)
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
        changed = self._rounds > _ENOUGH_ROUNDS and self._changed(found)
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
        free = smallest_period(found, self._fragments, self._bounds)
        tau = max(free, self._allowed(self._tau / self._fragments / 2))
        if tau != self._tau or self._chosen_for == Durations():
            self._log(self._reason(tau, free, found))
        self._tau, self._chosen_for = tau, found

    def _allowed(self, steps_between: float) -> int:
        return _nearest_period(steps_between, self._fragments, self._bounds)

    def _reason(self, tau: int, free: int, found: Durations) -> str:
        behind, rarely = _steps_between(found)
        hidden = tau // self._fragments >= behind
        return (
            f"tau=auto: {self._tau} -> {tau}. A step takes {found.step / 1e3:.1f} ms and an"
            f" exchange {found.exchange / 1e3:.1f} ms, which hides behind {behind} step(s); it"
            f" lengthens them by {found.cost / 1e3:.1f} ms, which is {_ALLOWED_COST:.0%} of"
            f" {rarely}."
            + ("" if hidden else f" Exchanges do not hide: tau_max={tau} is smaller.")
            + (f" It falls to {free} by halves." if free < tau else "")
        )


def smallest_period(found: Durations, fragments: int, bounds: tuple[int, int]) -> int:
    """The smallest τ at which an exchange hides behind training, as far as one can.

    Args:
        found: what a step and an exchange take.
        fragments: parts of the model, one of which is exchanged every τ / fragments steps.
        bounds: the smallest and the largest τ allowed.

    Raises:
        ValueError: no multiple of ``fragments`` lies within the bounds.
    """
    return _nearest_period(max(_steps_between(found)), fragments, _bounds(*bounds, fragments))


def _steps_between(found: Durations) -> tuple[int, int]:
    """Behind how many steps an exchange hides, and of how many its cost is small."""
    behind = max(1, math.ceil(found.exchange / found.step))
    return behind, math.ceil(found.cost / (_ALLOWED_COST * found.step))


def _nearest_period(steps_between: float, fragments: int, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return min(max(fragments * math.ceil(steps_between), least), most)


def _are_worth_a_choice(rounds: int) -> bool:
    """After the first few, and whenever four times as many have said what an exchange costs."""
    while rounds > _ENOUGH_ROUNDS and rounds % _MORE == 0:
        rounds //= _MORE
    return rounds in (_FIRST_ROUNDS, _ENOUGH_ROUNDS)


def _bounds(tau_min: object, tau_max: object, fragments: int) -> tuple[int, int]:
    for name, value in {"tau_min": tau_min, "tau_max": tau_max}.items():
        if not (is_number(value) and value >= 1 and value == int(value)):
            raise ValueError(
                f"{name}={value!r} is not allowed. Allowed: a whole number of optimizer steps, at"
                " least 1."
            )
    assert is_number(tau_min)
    assert is_number(tau_max)
    least = fragments * math.ceil(tau_min / fragments)
    most = fragments * math.floor(tau_max / fragments)
    if most < least:
        raise ValueError(
            f"tau_min={tau_min} and tau_max={tau_max} leave no period that is a multiple of"
            f" fragments={fragments}. Raise tau_max, or lower tau_min or fragments."
        )
    return least, most
