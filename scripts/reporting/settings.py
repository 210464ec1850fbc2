"""Runs that differ in their seed alone, as one setting; the front of the best, and a choice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sweeping import names, varied

from reporting.runs import Run

Better = Literal["max", "min"]
_LOWER = ("loss", "err", "bits", "perplexity")
_FEW = 3
"""Runs of a setting that a claim needs."""


@dataclass(frozen=True)
class Metric:
    """The number that settings are compared by."""

    name: str
    better: Better
    is_share: bool = False
    """Whether it lies between 0 and 1, and is shown in percent."""

    @property
    def label(self) -> str:
        """With its unit."""
        return f"{self.name} in %" if self.is_share else self.name

    def of(self, run: Run) -> float | None:
        """What a run reached; None where it has no such number, or none that is finite."""
        found = {**run.report.get("logged", {}), **run.report.get("tested", {})}.get(self.name)
        if found is None or not math.isfinite(found):
            return None
        return float(100 * found if self.is_share else found)

    def cost(self, value: float) -> float:
        """The value, so that less is better."""
        return value if self.better == "min" else -value

    def shown(self, value: float) -> str:
        """The value for a reader."""
        return f"{value:.2f}" if self.is_share else f"{value:.4g}"


@dataclass(frozen=True)
class Setting:
    """Runs that were told the same, but for the seed."""

    values: Mapping[str, str]
    """Of the keys that vary, among all runs."""
    runs: Sequence[Run]
    reached: Sequence[float]
    """By the runs that ended with a finite number."""

    @property
    def name(self) -> str:
        """What is typed for it."""
        return " ".join(f"{k}={v}" for k, v in self.values.items() if v) or "the only setting"

    @property
    def mean(self) -> float:
        """Of those that ended."""
        return statistics.fmean(self.reached)

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None of a single run."""
        if len(self.reached) < 2:
            return None
        return statistics.stdev(self.reached) / math.sqrt(len(self.reached))

    @property
    def megabytes(self) -> float | None:
        """Sent by the first worker, a run; None where nothing was counted."""
        sent = [run.report.get("bytes_sent") for run in self.runs if run.report]
        known = [each / 1e6 for each in sent if each is not None]
        return statistics.fmean(known) if known else None

    @property
    def is_whole(self) -> bool:
        """Whether all its runs ended, with finite numbers."""
        return len(self.reached) == len(self.runs)


def choose_metric(runs: Sequence[Run], name: str | None, better: Better | None) -> Metric:
    """The metric of this name; None: the first that was tested and is no loss.

    Raises:
        ValueError: no run has it.
    """
    tested = names(run.report.get("tested", {}) for run in runs)
    known = tested + names(run.report.get("logged", {}) for run in runs)
    if not known:
        raise ValueError("No run has a number that was tested or logged. See what is missing.")
    found = name or next((n for n in tested or known if "loss" not in n), (tested or known)[0])
    if found not in known:
        raise ValueError(
            f"--metric {found}: no run has tested or logged it. Allowed are"
            f" {', '.join(sorted(set(known)))}."
        )
    guess: Better = "min" if any(word in found.lower() for word in _LOWER) else "max"
    metric = Metric(found, better or guess)
    values = [value for run in runs if (value := metric.of(run)) is not None]
    return replace(metric, is_share="acc" in found and all(0 <= value <= 1 for value in values))


def group(runs: Sequence[Run], metric: Metric) -> list[Setting]:
    """The settings, in the order of their first runs."""
    keys, typed = varied([run.overrides for run in runs])
    keys = [key for key in keys if key != "seed"]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run, values in zip(runs, typed, strict=True):
        found.setdefault(tuple(values.get(key, "") for key in keys), []).append(run)
    return [
        Setting(
            dict(zip(keys, values, strict=True)),
            members,
            [value for run in members if (value := metric.of(run)) is not None],
        )
        for values, members in found.items()
    ]


def front(settings: Sequence[Setting], metric: Metric) -> list[Setting]:
    """Those than which none is better for as few bytes, the fewest bytes first (Pareto's front).

    Settings that lost a run are not on it: those that are left may be the lucky ones.
    """
    known = [s for s in settings if s.is_whole and s.megabytes is not None]
    found: list[Setting] = []
    for each in sorted(known, key=lambda s: (s.megabytes or 0.0, metric.cost(s.mean))):
        if not found or metric.cost(each.mean) < metric.cost(found[-1].mean):
            found.append(each)
    return found


@dataclass(frozen=True)
class Choice:
    """The setting to take, by a rule that the text names."""

    setting: Setting
    best: Setting
    text: str


def choose(settings: Sequence[Setting], metric: Metric) -> Choice | None:
    """The setting with the fewest bytes within one standard error of the best.

    Only settings count all of whose runs ended with finite numbers. None if there is none.
    """
    whole = [s for s in settings if s.is_whole and s.megabytes is not None]
    if not whole:
        return None
    best = min(whole, key=lambda s: metric.cost(s.mean))
    error = _error_of(best, whole)
    limit = metric.cost(best.mean) + (error or 0.0)
    near = [s for s in whole if metric.cost(s.mean) <= limit]
    chosen = min(near, key=lambda s: (s.megabytes or 0.0, metric.cost(s.mean)))
    return Choice(chosen, best, _text(chosen, best, error, metric))


def _error_of(best: Setting, settings: Sequence[Setting]) -> float | None:
    """The standard error of the best; of its one run, by the spread of the others' runs."""
    if best.error is not None:
        return best.error
    spreads = [statistics.variance(s.reached) for s in settings if len(s.reached) > 1]
    return math.sqrt(statistics.fmean(spreads)) if spreads else None


def _text(chosen: Setting, best: Setting, error: float | None, metric: Metric) -> str:
    lines = [
        "Recommended, by the rule 'the fewest bytes within one standard error of the best':",
        f"  {chosen.name}",
        f"  {metric.label} {_reached(chosen, metric)}, {chosen.megabytes:.4g} MB sent",
    ]
    if chosen is not best:
        lines.append(
            f"  The best is {best.name}: {_reached(best, metric)}, {best.megabytes:.4g} MB sent."
        )
    if error is None:
        lines.append(
            "  No setting has two runs, so the spread is not known, and this is the best alone."
            " Repeat with seed=1,2,3."
        )
    elif len(best.reached) < _FEW:
        lines.append(f"  The best has {len(best.reached)} run(s). Take {_FEW} seeds for a claim.")
    return "\n".join(lines)


def _reached(setting: Setting, metric: Metric) -> str:
    spread = "" if setting.error is None else f" ± {metric.shown(setting.error)}"
    return f"{metric.shown(setting.mean)}{spread} ({len(setting.reached)} run(s))"
