"""What one worker measures of its steps and exchanges.

[Note: what an exchange costs] Of an exchange, the way of the sum hides behind the τ steps that
follow, if they take as long. What does not hide is the work at both ends: differences, pull, the
center's move, and what the network takes from the processor on the way. That is found by comparing:
rounds with an exchange take longer than as many steps with nothing under way.

Two estimates bound it. The one by time is too high where workers share processors: while nothing
is under way here, other workers may wait for their sums, and leave their processors to this one.
The one by processor time is too low, for it misses the kernel's work for the network. Where the
second is lower, the cost is taken to be halfway between them.

The cost is a small difference of long times that vary. So all steps count, not only the latest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lightning_easgd.schedules import Durations
from lightning_easgd.schedules.automatic import ENOUGH_ROUNDS
from lightning_easgd.telemetry import Telemetry

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

    def add(self, step: Step) -> None:
        """Add one more."""
        self.steps += 1
        self.time += step.time
        self.processors += step.processors


class StepTimer:
    """Measures the steps and exchanges of one worker.

    A round is an exchange and the steps up to the next one.

    Args:
        clock: seconds.
        processors: seconds that this process has had of them.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        processors: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._processors = processors
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)  # idle ones
        self._flights: deque[float] = deque(maxlen=ENOUGH_ROUNDS)
        self._unsettled = _UNSETTLED_STEPS
        self.restart()
        self.interrupt()

    def restart(self) -> None:
        """Forget what was measured: it holds no longer."""
        self._recent.clear()
        self._flights.clear()
        self._idle, self._whole, self._rounds = Total(), Total(), 0
        self._longest = math.inf  # a longer time holds something else than a step

    def interrupt(self) -> None:
        """Forget what is being measured: something else than steps takes its time."""
        self._last_end: float | None = None
        self._last_used = 0.0
        self._departure: float | None = None
        self._round: list[Step] | None = None
        self._exchanged = self._idled = False
        self._waited = 0.0

    def wait(self, seconds: float) -> None:
        """The worker waited."""
        self._waited += seconds

    def arrive(self) -> None:
        """The sums that were under way are there."""
        if self._departure is not None:
            self._flights.append(self._clock() - self._departure)
            self._departure = None

    def exchange(self) -> None:
        """An exchange has started in this step; all before it is over."""
        if self._round is not None:
            for step in [] if self._idled else self._round[1:]:
                self._note_idle(step)  # the best that is known of idle ones
            for step in self._round:
                self._whole.add(step)
            self._rounds += 1
        self._round = None if self._last_end is None else []
        self._exchanged, self._idled = True, False
        if self._recent:
            self._longest = _OUTLIER * statistics.median(self._recent)
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
        cost = (longer + min(longer, busier)) / 2 / max(1, self._rounds)
        step = statistics.fmean(self._recent)  # no median: it adds up over a round
        exchange = statistics.median(self._flights) if self._flights else 0.0
        return Durations(*(math.ceil(1e6 * seconds) for seconds in (step, exchange, cost)))

    def report(self, telemetry: Telemetry) -> Durations:
        """What is known now; recorded, too."""
        measured = self.durations()
        telemetry.step_seconds = 1e-6 * measured.step
        telemetry.exchange_seconds = 1e-6 * measured.exchange
        telemetry.exchange_cost_seconds = 1e-6 * measured.cost
        return measured

    def _note(self, step: Step) -> None:
        if self._departure is None and not self._exchanged:
            self._note_idle(step)
            self._idled = True
        if self._round is not None:
            self._round.append(step)

    def _note_idle(self, step: Step) -> None:
        self._recent.append(step.time)
        self._idle.add(step)
