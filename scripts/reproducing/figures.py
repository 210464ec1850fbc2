"""The figures of the findings, drawn from the entries that are there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import stability
from matplotlib.figure import Figure
from presenting import style
from presenting.entries import tested

from reproducing.evidence import Evidence
from reproducing.findings import TAUS, TITLES, WORKERS, methods_at

_FAR = 3.0
"""Errors so many times as large as the others' get a panel of their own."""
_ALONE = {"sgd": "SGD, one worker", "ddp": "MSGD, one worker"}
_LABELS = [*TITLES.values(), *_ALONE.values()]


def error_over_tau(evidence: Evidence) -> Figure | None:
    """Of all methods at the end, mean and standard error."""
    points = {
        title: {
            tau: [*evidence.errors(name, methods_at(tau)[name]).values()]
            for tau in TAUS
            if name in methods_at(tau) and evidence.has(name, methods_at(tau)[name])
        }
        for name, title in TITLES.items()
    }
    for name, title in _ALONE.items():
        if evidence.has(name, None, 1):
            points[title] = {tau: [*evidence.errors(name, None, 1).values()] for tau in TAUS}
    means = {title: [*map(statistics.fmean, each.values())] for title, each in points.items()}
    if not any(means.values()):
        return None
    look = style.looks(_LABELS, None)
    apart = style.outside({title: max(each) for title, each in means.items() if each}, _FAR)

    def draw(axes: Any, far: bool) -> None:
        for title in (title for title, each in points.items() if each and (title in apart) == far):
            bars = [_standard_error(found) for found in points[title].values()]
            axes.errorbar(
                [*points[title]], means[title], bars, capsize=2, label=title, **look[title].line
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(TAUS, [*map(str, TAUS)])
        axes.set_xlabel("τ, optimizer steps between two exchanges")

    return style.panels(apart, draw, y="test error in %", far="far worse")


def error_over_steps(evidence: Evidence) -> Figure | None:
    """Of all methods with 4 workers, a panel for each τ."""
    found = {
        f"τ = {tau}": {
            TITLES[name]: _curve(evidence, name, period, 4)
            for name, period in methods_at(tau).items()
        }
        for tau in TAUS
    }
    return _curves(found, style.looks(_LABELS, None))


def error_over_workers(evidence: Evidence) -> Figure | None:
    """Of EASGD and EAMSGD at τ = 10, a curve for each p."""
    found = {
        TITLES[name]: {f"p = {p}": _curve(evidence, name, 10, p) for p in WORKERS}
        for name in ("easgd", "eamsgd")
    }
    return _curves(found, style.looks([f"p = {p}" for p in WORKERS], None))


def communication(evidence: Evidence) -> Figure | None:
    """The share of waits, a bar for each τ."""
    if not all(evidence.has("easgd_blocking", tau) for tau in (1, 10)):
        return None
    shares = {tau: evidence.waited("easgd_blocking", tau) for tau in (1, 10)}
    figure, axes = style.plain()
    heights = [statistics.fmean(each.values()) for each in shares.values()]
    bars = [_standard_error(list(each.values())) for each in shares.values()]
    axes.bar(range(len(shares)), heights, 0.5, yerr=bars, capsize=3, color="#56b4e9")
    axes.set_xticks(range(len(shares)), [*map(str, shares)])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("τ, optimizer steps between two exchanges")
    axes.set_ylabel("waited for exchanges, % of the time")
    return figure


def stable_where(_: Evidence) -> Figure:
    """The paper's figure 1."""
    figure, axes = style.plain()
    stability.draw_radii(axes)
    return figure


FIGURES: Mapping[str, tuple[str, Callable[[Evidence], Figure | None]]] = {
    "error_over_steps": (
        "Test error on the way with 4 workers, the mean of all seeds that did not diverge; cut off"
        " where it is twice as large as usual.",
        error_over_steps,
    ),
    "error_over_tau": (
        "Test error at the end with 4 workers, mean and standard error of all seeds.",
        error_over_tau,
    ),
    "error_over_workers": (
        "Test error on the way at τ = 10, the mean of all seeds that did not diverge.",
        error_over_workers,
    ),
    "communication": (
        "Share of the time that a worker waits for exchanges, mean and standard error.",
        communication,
    ),
    "stability": (
        "What a round of workers in turn does to the distance from the minimum, at η = 0.001.",
        stable_where,
    ),
}
"""Captions and figures, by the names that findings have for them."""

_Curve = tuple[np.ndarray, np.ndarray]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def _curve(evidence: Evidence, name: str, tau: int | None, workers: int) -> _Curve | None:
    """Steps, and the mean test error of the seeds; as far as all of them were tested."""
    entry = evidence.entries.get((name, tau, workers))
    runs = [tested(run) for run in entry.finished.values()] if entry else []
    length = min(map(len, runs), default=0)
    if not length:
        return None
    errors = [[100 * (1 - (point.score or 0.0)) for point in run[:length]] for run in runs]
    return np.array([point.step for point in runs[0][:length]]), np.mean(errors, axis=0)


def _curves(
    panels: Mapping[str, Mapping[str, _Curve | None]], look: Mapping[str, style.Look]
) -> Figure | None:
    """A panel for each that has curves, all with the same axes."""
    found = {
        title: {label: curve for label, curve in panel.items() if curve is not None}
        for title, panel in panels.items()
    }
    found = {title: curves for title, curves in found.items() if curves}
    if not found:
        return None
    rows, columns = (len(found) + 1) // 2, min(2, len(found))
    size = (0.2 + 0.7 * columns) * style.SIZE[0], (0.4 + 0.65 * rows) * style.SIZE[1]
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, found.items(), strict=False):
        for label, curve in curves.items():
            axes.plot(*curve, label=label, **look[label].line)
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps of a worker")
    # What all begin with, and one that diverges, would squash the rest.
    ends = np.concatenate([y[len(y) // 4 :] for each in found.values() for _, y in each.values()])
    low, high = ends.min(), min(ends.max(), 2 * np.median(ends))
    grid[0, 0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    figure.supylabel("test error in %", fontsize="medium")
    _legend_once(figure)
    return figure


def _legend_once(figure: Figure) -> None:
    """Each label of all panels once."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend([*found.values()], [*found], loc="outside lower center", ncols=3, handlelength=3)
