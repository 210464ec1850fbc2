"""A table for the terminal, JSON lines and a picture of summaries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from comparing.networks import rate_of
from comparing.summary import LIMIT, Summary

_AXIS_TITLES = {
    "network": "bandwidth of each host",
    "hosts": "workers",
    "stall": "seconds of a random stall",
    "slow": "times that the last worker's steps are longer",
}
_STYLES = ("-", "--", ":", "-.")


def table(summaries: Sequence[Summary], titles: Mapping[str, str], baselines: Sequence[str]) -> str:
    """All summaries, one table per setting.

    Args:
        summaries: those of a setting next to each other.
        titles: of contenders, by name.
        baselines: contenders that samples/s are compared to.
    """
    parts = []
    for setting, group in groupby(summaries, key=lambda summary: summary.setting):
        found = list(group)
        compared = [name for name in baselines if any(s.contender == name for s in found)]
        rows = [_header(compared, titles), *(_row(s, titles, compared) for s in found)]
        repetitions = sorted({summary.repetitions for summary in found})
        counts = "-".join(str(n) for n in {repetitions[0]: 0, repetitions[-1]: 0})
        parts.append(f"{setting}; medians of {counts} repetition(s)\n{aligned(rows)}")
    return "\n\n".join(parts)


def _header(compared: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    ratios = [f"to {titles.get(name, name)}" for name in compared]
    traffic = ["τ", "sent/step", "to fp32 ring", "waits p50", "p95"]
    return ["", "samples/s", "range", *ratios, *traffic, "memory"]


def _row(summary: Summary, titles: Mapping[str, str], compared: Sequence[str]) -> list[str]:
    about = "" if summary.waits_are_counted else "~"
    return [
        titles.get(summary.contender, summary.contender),
        f"{summary.samples_per_second:.0f}",
        f"{summary.lowest:.0f}-{summary.highest:.0f}",
        *(_ratio(summary.ratios.get(name), percent=name == LIMIT) for name in compared),
        _or_dash(summary.period, "{:g}"),
        f"{summary.bytes_per_step / 1e3:.1f} kB",
        _or_dash(summary.bytes_to_ring, "{:.3f}"),
        _milliseconds(summary.wait_p50, about),
        _milliseconds(summary.wait_p95, about),
        f"{summary.peak_bytes / 1e6:.0f} MB",
    ]


def _ratio(value: float | None, *, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if percent else f"{value:.2f} x"


def _milliseconds(seconds: float | None, about: str) -> str:
    return "-" if seconds is None else f"{about}{1e3 * seconds:.1f} ms"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines; columns have a width each, the first is aligned on its left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"  {row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def write_lines(summaries: Sequence[Summary], path: Path) -> None:
    """One JSON object a line for each summary."""
    path.write_text("".join(f"{json.dumps(asdict(summary))}\n" for summary in summaries))


def draw(summaries: Sequence[Summary], titles: Mapping[str, str], over: str, path: Path) -> None:
    """A picture of samples/s over what was swept, one line per contender; bars if nothing was.

    Args:
        summaries: of all settings.
        titles: of contenders, by name.
        over: the field of settings on the horizontal axis.
        path: the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    values = sorted({getattr(summary, over) for summary in summaries}, key=_order)
    if len(values) == 1:
        _draw_bars(axes, summaries, titles)
    else:
        _draw_lines(axes, summaries, titles, over, values)
        figure.legend(loc="outside right upper", fontsize="small")
    FigureCanvasAgg(figure).print_png(path)


def _draw_bars(axes: Any, summaries: Sequence[Summary], titles: Mapping[str, str]) -> None:
    names = [titles.get(summary.contender, summary.contender) for summary in summaries]
    rates = [summary.samples_per_second for summary in summaries]
    axes.barh(names, rates, xerr=_spread(summaries), capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel("samples/s of all workers, median and range")
    axes.set_title(str(summaries[0].setting))


def _draw_lines(
    axes: Any,
    summaries: Sequence[Summary],
    titles: Mapping[str, str],
    over: str,
    values: Sequence[Any],
) -> None:
    for index, name in enumerate(dict.fromkeys(summary.contender for summary in summaries)):
        found = [summary for summary in summaries if summary.contender == name]
        found.sort(key=lambda summary: _order(getattr(summary, over)))
        axes.errorbar(
            [values.index(getattr(summary, over)) for summary in found],
            [summary.samples_per_second for summary in found],
            yerr=_spread(found),
            label=titles.get(name, name),
            linestyle=_STYLES[index // 10 % len(_STYLES)],
            marker="o",
            capsize=2,
        )
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlabel(_AXIS_TITLES[over])
    axes.set_ylabel("samples/s of all workers, median and range")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _spread(summaries: Sequence[Summary]) -> list[list[float]]:
    below = [summary.samples_per_second - summary.lowest for summary in summaries]
    return [below, [summary.highest - summary.samples_per_second for summary in summaries]]


def _order(value: str | float | None) -> float:
    if value is not None and not isinstance(value, str):
        return value
    try:
        return rate_of(value) or float("inf")
    except ValueError:  # the network of a cluster
        return float("inf")
