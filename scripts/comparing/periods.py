"""A picture of accuracies over τ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from comparing.result import Result

_STYLES = ("o-", "s-", "^--", "v--", "D--", "P:", "X-.")


def draw(results: Sequence[Result], titles: Mapping[str, str], path: Path) -> None:
    """A picture of test accuracy over τ, a line per contender; x where a run diverged.

    Args:
        results: of all jobs.
        titles: of contenders, by name.
        path: the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    periods = _periods(results)
    for index, (name, style) in enumerate(zip(titles, cycle(_STYLES), strict=False)):
        # Beside each other, so that ranges do not hide ranges.
        places = [place + 0.05 * (index - (len(titles) - 1) / 2) for place in range(len(periods))]
        found = [_of(results, name, tau) for tau in periods]
        _draw_line(axes, places, found, titles[name], style)
    axes.set_xticks(range(len(periods)), [str(tau) for tau in periods])
    axes.set_xlabel("τ, optimizer steps between two exchanges")
    axes.set_ylabel("test accuracy in %, median and range of seeds")
    axes.grid(alpha=0.3)
    if any(result.score is None for result in results):
        axes.plot([], [], "kx", label="some diverged")
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=low - 0.1 * (high - low))
    figure.legend(loc="outside right upper", fontsize="small")
    FigureCanvasAgg(figure).print_png(path)


def _draw_line(
    axes: Any,
    places: Sequence[float],
    found: Sequence[Sequence[Result]],
    title: str,
    style: str,
) -> None:
    """One contender: what it found at each period, and below all of that where runs diverged."""
    known = [[100 * r.score for r in each if r.score is not None] for each in found]
    medians = [statistics.median(each) if each else math.nan for each in known]
    below = [median - min(each, default=0) for median, each in zip(medians, known, strict=True)]
    above = [max(each, default=0) - median for median, each in zip(medians, known, strict=True)]
    line = axes.errorbar(places, medians, yerr=[below, above], fmt=style, label=title, capsize=2)
    together = zip(places, known, found, strict=True)
    if lost := [place for place, values, each in together if len(values) < len(each)]:
        color, bottom = line.lines[0].get_color(), axes.get_xaxis_transform()
        axes.plot(lost, [0.03] * len(lost), "x", color=color, transform=bottom)


def _periods(results: Sequence[Result]) -> list[int]:
    return sorted({result.tau for result in results if result.tau is not None}) or [1]


def _of(results: Sequence[Result], name: str, tau: int) -> list[Result]:
    return [r for r in results if r.contender == name and r.tau in (None, tau)]
