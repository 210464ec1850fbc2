"""Runs that were told the same but for the seed, each at its best learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from comparing.result import Point, Result

from presenting.score import Score

Rate = float | None
Runs = Mapping[int, Result]
"""By seed."""


@dataclass(frozen=True)
class Entry:
    """A contender at a period, with the learning rate that its tuning chose."""

    contender: str
    tau: int | None
    title: str
    rate: Rate
    runs: Runs
    """Those that ended, diverged ones too."""
    tried: Mapping[Rate, Runs] = field(default_factory=dict)
    """Runs of the tuning, by learning rate; nothing where one rate was given."""
    failed: Sequence[Result] = ()
    """Runs that ended with an error, and were not repeated."""

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        return self.title if self.tau is None else f"{self.title} (τ\u00a0=\u00a0{self.tau})"

    @cached_property
    def finished(self) -> dict[int, Result]:
        """Those that did not diverge, and have a result."""
        return {seed: run for seed, run in self.runs.items() if final(run) is not None}

    def values(self, of: Callable[[Result], float | None]) -> dict[int, float]:
        """A number of each finished run that has it, by seed."""
        found = {seed: of(run) for seed, run in self.finished.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def entries_of(results: Iterable[Result], about: Mapping[str, Any], score: Score) -> list[Entry]:
    """All entries, in the order of the titles and then of τ.

    Raises:
        ValueError: there are none.
    """
    groups: dict[tuple[str, int | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.contender, result.tau), []).append(result)
    if not groups:
        raise ValueError("There are no results to report on. Train something, or name a folder.")
    titles = about["titles"]
    order = [*titles, *(name for name, _ in groups if name not in titles)]
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1] or 0))
    return [_entry(key, groups[key], about, score) for key in keys]


def tested(run: Result) -> list[Point]:
    """The tests that found a finite number."""
    return [p for p in run.points if p.score is not None and math.isfinite(p.score)]


def final(run: Result) -> float | None:
    """The score of the delivered model; None where training diverged."""
    known = run.diverged is None and run.score is not None and math.isfinite(run.score)
    return run.score if known else None


def reached(run: Result, target: float | None, score: Score) -> Point | None:
    """The first test that met the target; never a moment between two tests."""
    return None if target is None else run.reached(target, lower=score.lower_is_better)


def score_at(run: Result, seconds: float) -> float | None:
    """What the last test up to a moment of training found; None if there was none."""
    before = [p.score for p in tested(run) if p.seconds <= seconds]
    return before[-1] if before else None


def mean_cost(runs: Runs, seeds: Iterable[int], score: Score) -> float:
    """Of the runs with these seeds; one that diverged is worse than all that did not."""
    found = [final(runs[seed]) for seed in seeds]
    return statistics.fmean(math.inf if v is None else score.cost(v) for v in found)


def common_seeds(tried: Mapping[Rate, Runs]) -> list[int]:
    """Those that all rates were tried with."""
    return sorted(set.intersection(*map(set, tried.values()))) if tried else []


def _entry(
    key: tuple[str, int | None], results: Sequence[Result], about: Mapping[str, Any], score: Score
) -> Entry:
    ended = {result.job: result for result in results if result.error is None}
    failed = {result.job: result for result in results if result.error is not None}
    here = [r for r in ended.values() if r.network == about["network"] and not r.tuning]
    counted = _by_rate(r for r in here if r.seed in about["seeds"])
    tried = _by_rate(r for r in ended.values() if r.tuning) or counted
    rate = _best(tried, score)
    title = about["titles"].get(key[0], key[0])
    runs = counted.get(rate, {})
    tried = tried if len(tried) > 1 else {}
    left = [run for job, run in failed.items() if job not in ended]
    return Entry(*key, title=title, rate=rate, runs=runs, tried=tried, failed=left)


def _by_rate(results: Iterable[Result]) -> dict[Rate, dict[int, Result]]:
    found: dict[Rate, dict[int, Result]] = {}
    for result in results:
        found.setdefault(result.rate, {})[result.seed] = result
    return found


def _best(tried: Mapping[Rate, Runs], score: Score) -> Rate:
    seeds = common_seeds(tried)
    if not seeds:
        return next(iter(tried), None)
    return min(tried, key=lambda rate: mean_cost(tried[rate], seeds, score))
