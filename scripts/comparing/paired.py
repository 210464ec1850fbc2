"""A table of contenders at their best learning rates, against one of them with the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarking.report import aligned

from comparing.plan import Entry, Found, Plan
from comparing.result import Result


def table(plan: Plan, found: Found, titles: Mapping[str, str], baseline: str | None) -> str:
    """A row for each contender and period: what it reached, and how far that is from the baseline.

    Means and their standard errors over seeds. A difference is of runs with the same seed.

    Args:
        plan: which results belong together.
        found: the results.
        titles: of contenders, by name.
        baseline: the contender that others are compared to; None, or one that is not there: none.
    """
    against = next((entry for entry in plan.entries if entry[0] == baseline), None)
    tried = plan.rates if len(plan.rates) > 1 else []
    rows = [
        [
            *("test accuracy, %", *(f"at η = {rate:g}" for rate in tried if rate is not None)),
            *("best η" if tried else "", "mean", "seeds"),
            *([f"to {titles[against[0]]}"] if against else []),
            "bytes sent",
        ]
    ]
    for entry in plan.entries:
        results = plan.best(entry, found)
        scores = plan.tried(entry, found)
        rows.append(
            [
                _title(entry, titles),
                *(f"{100 * scores[rate]:.2f}" if rate in scores else "-" for rate in tried),
                f"{results[0].rate:g}" if tried and results else "",
                *_reached(results),
                *([_difference(results, plan.best(against, found))] if against else []),
                _share(results),
            ]
        )
    return aligned(rows)


def _title(entry: Entry, titles: Mapping[str, str]) -> str:
    name, tau = entry
    return titles[name] if tau is None else f"{titles[name]}, τ = {tau}"


def _reached(results: Sequence[Result]) -> tuple[str, str]:
    known = [100 * result.score for result in results if result.score is not None]
    diverged = len(results) - len(known)
    number = f"{len(results)}, {diverged} diverged" if diverged else str(len(results))
    return _mean(known, "{:.2f}"), number


def _difference(results: Sequence[Result], others: Sequence[Result]) -> str:
    """In percentage points, of those that have a partner."""
    if results == others:
        return "-"
    partners = {other.seed: other.score for other in others if other.score is not None}
    return _mean(
        [
            100 * (result.score - partners[result.seed])
            for result in results
            if result.score is not None and result.seed in partners
        ],
        "{:+.2f}",
    )


def _share(results: Sequence[Result]) -> str:
    """Of what DDP would have sent."""
    shares = [r.sent_bytes / r.ddp_bytes for r in results if r.sent_bytes and r.ddp_bytes]
    return f"{100 * statistics.fmean(shares):.1f} % of DDP's" if shares else "-"


def _mean(values: Sequence[float], form: str) -> str:
    """With its standard error, if there are several."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
