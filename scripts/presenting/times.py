"""Where the time of a step goes, and which worker is the slowest.

[Note: estimate] Under DDP nobody counts waits, which are inside of the backward pass. There they
are estimated: what a step took beyond a step without exchanges, as another contender measured it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from comparing.result import Result, WorkerTime

from presenting.break_even import compute_seconds
from presenting.entries import Entry


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in the mean of workers and seeds; None where nobody can tell."""

    label: str
    seconds: float | None
    computing: float | None
    waited: float | None
    hidden: float | None
    estimated: bool = False
    """Whether waiting is estimated: see [Note: estimate]."""
    slowest: str = ""
    """The worker whose steps took longest, and by how much."""


def step_times(entries: Sequence[Entry]) -> list[StepTime]:
    """Of all that finished."""
    known = [found for entry in entries if (found := compute_seconds(entry)) is not None]
    alone = statistics.median(known) if known else None
    return [_step_time(entry, alone) for entry in entries if entry.finished]


def _step_time(entry: Entry, alone: float | None) -> StepTime:
    workers = [(w, run.steps) for run in entry.finished.values() for w in run.workers if run.steps]
    if not workers:
        return StepTime(entry.label, None, None, None, None)
    seconds = statistics.fmean(worker.seconds / steps for worker, steps in workers)
    computing, waited, hidden = (
        _mean([_each(getattr(worker, name), steps) for worker, steps in workers])
        for name in ("computing", "waited", "hidden")
    )
    estimated = waited is None and alone is not None
    if estimated:
        computing = min(alone, seconds)
        waited = seconds - computing
    slowest = _slowest([*entry.finished.values()])
    return StepTime(entry.label, seconds, computing, waited, hidden, estimated, slowest)


def _each(value: float | None, steps: int) -> float | None:
    return None if value is None else value / steps


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(v for v in values if v is not None)


def _slowest(runs: Sequence[Result]) -> str:
    """By name, with how much longer its steps took than those of the median worker."""
    names: dict[str, list[float]] = {}
    for run in runs:
        for name, seconds in _paces(run):
            names.setdefault(name, []).append(seconds)
    means = {name: statistics.fmean(values) for name, values in names.items()}
    if len(means) < 2 or not all(means.values()):
        return ""
    name = max(means, key=means.__getitem__)
    more = 100 * (means[name] / statistics.median(means.values()) - 1)
    return f"{name}, {more:.0f} % above the median" if more >= 1 else "all alike within 1 %"


def _paces(run: Result) -> Iterator[tuple[str, float]]:
    """Of each worker, seconds of a step without what it waited for others."""
    for rank, worker in enumerate(run.workers):
        pace = _pace(worker, run.steps)
        if pace is not None:
            yield f"worker {rank} ({worker.host})", pace


def _pace(worker: WorkerTime, steps: int | None) -> float | None:
    if worker.step_seconds:  # 0 where no step was without an exchange
        return worker.step_seconds
    return worker.computing / steps if worker.computing is not None and steps else None
