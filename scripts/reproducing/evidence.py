"""What was run, by method, τ and number of workers, and what may be concluded from pairs of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from comparing.result import Result
from presenting.difference import ENOUGH
from presenting.entries import Entry, entries_of, final, tested
from presenting.score import score_of

Study = tuple[Sequence[Result], Mapping[str, Any]]
"""Results, and what about.json says of them."""

BySeed = Mapping[int, float]


class NotTested(Exception):
    """A finding lacks runs; says which."""


@dataclass(frozen=True)
class Difference:
    """Of numbers of the same seeds: mean and standard error."""

    values: Sequence[float]

    @classmethod
    def of(cls, one: BySeed, other: BySeed | None = None) -> Difference:
        """One less the other, or less 0, seed by seed.

        Raises:
            NotTested: fewer seeds have both than a claim needs.
        """
        other = dict.fromkeys(one, 0.0) if other is None else other
        seeds = sorted(set(one) & set(other))
        if len(seeds) < ENOUGH:
            raise NotTested(f"only {len(seeds)} of {ENOUGH} seeds have both runs of a pair")
        return cls([one[seed] - other[seed] for seed in seeds])

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Its standard error."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def is_above(self) -> bool:
        """Whether it is above 0 by two standard errors or more."""
        return self.mean > 0 and self.mean >= 2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}".replace("-", "−")


@dataclass(frozen=True)
class Evidence:
    """All entries of all studies, each at the best of the learning rates that it tried."""

    entries: Mapping[tuple[str, int | None, int], Entry]
    """By contender, τ and number of workers."""
    target: float | None = None
    """The test accuracy whose time is compared."""
    guessing: float = 90.0
    """Test error of guessing in %, as which a run counts that diverged."""

    @classmethod
    def of(cls, studies: Iterable[Study]) -> Evidence:
        """That of some studies.

        Raises:
            ValueError: there is no study.
        """
        entries, target, classes = {}, None, 10
        for results, about in studies:
            score = score_of(about["metric"], lower_is_better=about["lower_is_better"])
            target = about["target"]
            classes = about["configuration"].get("classes") or classes
            for entry in entries_of(results, about, score):
                entries[entry.contender, entry.tau, about["workers"]] = entry
        if not entries:
            raise ValueError("There is no result. Train something, or name a folder that has some.")
        return cls(entries, target, 100 * (1 - 1 / classes))

    def entry(self, name: str, tau: int | None, workers: int = 4) -> Entry:
        """One with enough seeds for a claim.

        Raises:
            NotTested: there is none.
        """
        entry = self.entries.get((name, tau, workers))
        runs = len(entry.runs) if entry else 0
        if entry is None or runs < ENOUGH:
            period = "" if tau is None else f" at τ = {tau}"
            where = f"{entry.title if entry else name}{period} with {workers} workers"
            raise NotTested(f"{where} has {runs} of {ENOUGH} runs")
        return entry

    def has(self, name: str, tau: int | None, workers: int = 4) -> bool:
        """Whether there are enough seeds for a claim."""
        entry = self.entries.get((name, tau, workers))
        return entry is not None and len(entry.runs) >= ENOUGH

    def errors(self, name: str, tau: int | None, workers: int = 4) -> dict[int, float]:
        """Test error in % at the end, by seed."""
        runs = self.entry(name, tau, workers).runs
        return {seed: self._error(final(run)) for seed, run in runs.items()}

    def best_errors(self, name: str, tau: int | None, workers: int = 4) -> dict[int, float]:
        """The least test error in % of all tests on the way, by seed."""
        runs = self.entry(name, tau, workers).runs
        found = {seed: [p.score for p in tested(run)] for seed, run in runs.items()}
        return {seed: self._error(max(scores, default=None)) for seed, scores in found.items()}

    def steps_to_target(self, name: str, tau: int | None, workers: int = 4) -> dict[int, float]:
        """A worker's steps until a test reached the target, by seed; infinite if none did.

        Raises:
            NotTested: there is no target.
        """
        if self.target is None:
            raise NotTested("no target was set")
        runs = self.entry(name, tau, workers).runs
        points = {seed: run.reached(self.target) for seed, run in runs.items()}
        return {seed: point.step if point else math.inf for seed, point in points.items()}

    def waited(self, name: str, tau: int | None, workers: int = 4) -> dict[int, float]:
        """Share in % of a worker's time that it waited for exchanges, by seed."""
        return {  # which this package counts, and more than none: it is blocking
            seed: 100 * statistics.fmean(w.waited / w.seconds for w in run.workers)
            for seed, run in self.entry(name, tau, workers).runs.items()
        }

    def largest_jump(self, name: str, tau: int | None, workers: int = 4) -> float:
        """By how many points the test error rose at most from one test to the next, in any run.

        A run that diverged rose to what guessing has.
        """
        jumps = [0.0]
        for run in self.entry(name, tau, workers).runs.values():
            errors = [self._error(point.score) for point in run.points]
            errors += [self.guessing] if run.diverged else []
            jumps += [after - before for before, after in pairwise(errors)]
        return max(jumps)

    def _error(self, score: float | None) -> float:
        return self.guessing if score is None else 100 * (1 - score)


def mean_of(*values: BySeed) -> dict[int, float]:
    """The mean of several numbers, seed by seed, where all have one."""
    common = set.intersection(*map(set, values))
    return {seed: statistics.fmean(each[seed] for each in values) for seed in common}


def shown(values: BySeed, digits: int = 2) -> str:
    """Mean ± standard error over seeds."""
    numbers = list(values.values())
    known = [number for number in numbers if math.isfinite(number)]
    if len(known) < len(numbers):
        return f"reached by {len(known)} of {len(numbers)}"
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.fmean(numbers):.{digits}f} ± {error:.{digits}f}"
