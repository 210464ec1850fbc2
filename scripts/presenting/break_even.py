"""From which bandwidth on the baseline wins, by a model of what a step takes.

[Note: model] A step computes for c seconds and sends b bytes. Over a network of B bits per second
the bytes take 8b/B. An exchange that hides behind the steps makes a step max(c, 8b/B), as in
``advising.judging``; one that does not makes it c + 8b/B. How much of its sums DDP hides behind its
backward pass is not known, so it is taken both ways. A run of n steps takes n times as long.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from advising.judging import WORTH, hidden_step

from presenting.against import Against
from presenting.entries import Entry, reached


@dataclass(frozen=True)
class Method:
    """What a run to the target takes of the processors and of the network."""

    steps: float
    sent_bytes: float
    """By a worker in a step, in the mean."""
    hides: bool | None
    """Whether exchanges hide behind steps; None: not known."""

    def seconds(self, compute: float, rate: float, *, hides: bool) -> float:
        """Of a run over a network of ``rate`` bits per second."""
        exchange = 8 * self.sent_bytes / rate
        return self.steps * (hidden_step(compute, exchange) if hides else compute + exchange)


@dataclass(frozen=True)
class BreakEven:
    """Two methods, and the bandwidths from which on the baseline wins."""

    label: str
    baseline: str
    compute: float
    """Seconds of a step of either."""
    method: Method
    other: Method
    """The baseline."""
    to_target: bool
    """Whether runs end at the target; otherwise after as many samples."""
    measured_rate: float | None

    @property
    def if_hidden(self) -> float | None:
        """The least bits per second, if the baseline hides what it can; None: it always wins."""
        return self._from_on(hides=True)

    @property
    def if_awaited(self) -> float | None:
        """Likewise, if the baseline waits for all of its sums."""
        return self._from_on(hides=False)

    def ratio(self, rate: float, *, hides: bool) -> float:
        """How many times as long the baseline takes, if it hides its sums or not."""
        mine = self.method.seconds(self.compute, rate, hides=bool(self.method.hides))
        return self.other.seconds(self.compute, rate, hides=hides) / mine

    def _from_on(self, *, hides: bool) -> float | None:
        """Where the ratio falls below what is worth it, from the highest such rate."""
        # Above the rate at which its own exchanges begin to hide, the ratio only falls.
        low, high = 8 * self.method.sent_bytes / self.compute, 1e15
        if not self.method.hides:
            low = 1.0
        if self.ratio(low, hides=hides) < WORTH:
            return None
        if self.ratio(high, hides=hides) >= WORTH:
            return float("inf")
        for _ in range(200):
            middle = (low * high) ** 0.5
            if self.ratio(middle, hides=hides) >= WORTH:
                low = middle
            else:
                high = middle
        return high


def break_even(row: Against) -> BreakEven | None:
    """Of an entry and the baseline; None where compute or bytes were not measured."""
    if row.baseline is None or row.is_baseline:
        return None
    compute = compute_seconds(row.entry) or compute_seconds(row.baseline)
    to_target = bool(row.time_saved)
    method, other = _method(row.entry, row, to_target), _method(row.baseline, row, to_target)
    if compute is None or method is None or other is None:
        return None
    rates = [r.link_rate for r in row.entry.finished.values() if r.link_rate is not None]
    return BreakEven(
        label=row.entry.label,
        baseline=row.baseline.label,
        compute=compute,
        method=method,
        other=other,
        to_target=to_target,
        measured_rate=statistics.median(rates) if rates else None,
    )


def compute_seconds(entry: Entry) -> float | None:
    """Of a step without exchanges, of the slowest worker of each run, in the mean."""
    slowest = [
        max(worker.step_seconds for worker in run.workers)
        for run in entry.finished.values()
        if run.workers and all(worker.step_seconds for worker in run.workers)
    ]
    return statistics.fmean(slowest) if slowest else None


def _method(entry: Entry, row: Against, to_target: bool) -> Method | None:
    common = set(row.entry.finished) & set(row.baseline.finished if row.baseline else ())
    steps, per_step = [], []
    for seed in common:
        run = entry.finished[seed]
        sent = run.sent_bytes
        if sent is None and entry is row.baseline:
            sent = row.entry.finished[seed].ddp_bytes
        if not run.steps or sent is None:
            return None
        point = reached(run, row.target, row.score) if to_target else None
        if to_target and point is None:
            continue
        steps.append(point.step if point else run.steps)
        per_step.append(sent / run.steps)
    if not steps:
        return None
    return Method(statistics.fmean(steps), statistics.fmean(per_step), _hides(entry))


def _hides(entry: Entry) -> bool | None:
    hidden = [w.hidden for run in entry.finished.values() for w in run.workers]
    return None if not hidden or None in hidden else sum(hidden) > 0
