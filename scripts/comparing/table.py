"""A table of contenders at their best learning rates, against one of them with the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comparing.plan import Entry, Found, Plan
from comparing.result import Result
from comparing.speed_report import aligned


@dataclass(frozen=True)
class Table:
    """Rows of contenders and periods: time to the target, score and bytes, and differences.

    Means and their standard errors over seeds. A difference is of runs with the same seed.

    Args:
        plan: which results belong together.
        titles: of contenders, by name.
        metric: what the score is, by the name under which validation logs it.
        baseline: the contender that others are compared to; None, or one that is not there: none.
        target: the score whose time is compared; None: none is.
    """

    plan: Plan
    titles: Mapping[str, str]
    metric: str = "test accuracy"
    baseline: str | None = None
    target: float | None = None

    def text(self, found: Found) -> str:
        """The table.

        Args:
            found: the results.
        """
        return aligned([self._header(), *(self._row(entry, found) for entry in self.plan.entries)])

    @property
    def _against(self) -> Entry | None:
        return next((entry for entry in self.plan.entries if entry[0] == self.baseline), None)

    @property
    def _percent(self) -> bool:
        return "acc" in self.metric

    @property
    def _tried(self) -> list[float]:
        """Learning rates, if they are the same for all."""
        lists = {tuple(self.plan.rates[name]) for name, _ in self.plan.entries}
        rates = lists.pop() if len(lists) == 1 else ()
        return [rate for rate in rates if rate is not None] if len(rates) > 1 else []

    def _header(self) -> list[str]:
        name = self.metric.rpartition("/")[2].replace("_", " ")
        against = [] if self._against is None else [f"to {self.titles[self._against[0]]}"]
        until = [] if self.target is None else [f"time to {self.shown(self.target)}", *against]
        return [
            f"{name}, %" if self._percent else name,
            *(f"at η = {rate:g}" for rate in self._tried),
            *("best η", "mean", "seeds"),
            *against,
            *until,
            "bytes sent",
        ]

    def _row(self, entry: Entry, found: Found) -> list[str]:
        results, tried = self.plan.best(entry, found), self.plan.tried(entry, found)
        against = self._against
        others = self.plan.best(against, found) if against else []
        rate = results[0].rate if results else None
        return [
            self.titles[entry[0]] + ("" if entry[1] is None else f", τ = {entry[1]}"),
            *(self.shown(tried[rate]) if rate in tried else "-" for rate in self._tried),
            "" if rate is None or len(self.plan.rates[entry[0]]) == 1 else f"{rate:g}",
            *self._reached(results),
            *([self._difference(results, others)] if against else []),
            *([] if self.target is None else self._times(results, others)),
            _share(results),
        ]

    def shown(self, score: float) -> str:
        """A score, in % if it is an accuracy."""
        return f"{100 * score:.2f}" if self._percent else f"{score:.3f}"

    def _mean(self, scores: Sequence[float], sign: str = "") -> str:
        scale, digits = (100, 2) if self._percent else (1, 3)
        return mean_text([scale * score for score in scores], f"{{:{sign}.{digits}f}}")

    def _reached(self, results: Sequence[Result]) -> tuple[str, str]:
        known = [result.score for result in results if result.score is not None]
        diverged = len(results) - len(known)
        number = f"{len(results)}, {diverged} diverged" if diverged else str(len(results))
        return self._mean(known), number

    def _difference(self, results: Sequence[Result], others: Sequence[Result]) -> str:
        """Of those that have a partner; in percentage points, if scores are percentages."""
        if results == others:
            return "-"
        partners = {other.seed: other.score for other in others if other.score is not None}
        pairs = [
            result.score - partners[result.seed]
            for result in results
            if result.score is not None and result.seed in partners
        ]
        return self._mean(pairs, "+")

    def _times(self, results: Sequence[Result], others: Sequence[Result]) -> list[str]:
        """Seconds until the target was reached; where a run did not, how many did."""
        mine, theirs = self._seconds(results), self._seconds(others)
        told = mean_text(list(mine.values()), "{:.1f}") + (" s" if mine else "")
        if len(mine) < len(results):
            told += f", {len(mine)} of {len(results)} reached it"
        if self._against is None:
            return [told]
        saved = [100 * (mine[seed] / theirs[seed] - 1) for seed in mine if seed in theirs]
        ratio = "-" if results == others or not saved else f"{mean_text(saved, '{:+.0f}')} %"
        return [told, ratio]

    def _seconds(self, results: Sequence[Result]) -> dict[int, float]:
        reached = {
            result.seed: result.reached(self.target, lower=self.plan.lower)
            for result in results
            if self.target is not None
        }
        return {seed: point.seconds for seed, point in reached.items() if point is not None}


def mean_text(values: Sequence[float], form: str) -> str:
    """Their mean, with its standard error, if there are several."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {form.replace('+', '').format(error)}"


def _share(results: Sequence[Result]) -> str:
    """Of what DDP would have sent."""
    shares = [r.sent_bytes / r.ddp_bytes for r in results if r.sent_bytes and r.ddp_bytes]
    return f"{100 * statistics.fmean(shares):.1f} % of DDP's" if shares else "-"
