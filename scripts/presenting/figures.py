"""The figures of the page; each is drawn from points that were tested, none in between.

[Note: curves] A curve is the mean over seeds, test by test, with the range of the seeds around it.
It ends where the first of its runs has no more tests, and leaves out runs that diverged, but for
figures that show diverging.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from comparing.result import Point, Result
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from presenting.break_even import BreakEven
from presenting.entries import Entry, final, tested
from presenting.score import Score
from presenting.style import GRID, INK, Look, legend, looks, outside, panels, plain
from presenting.times import StepTime
from presenting.words import scaled

_FAR, _DIVERGED = 5.0, 20.0
"""Beyond so many times what the others extend to, a curve gets a panel of its own; of distances,
which differ between rules, and grow without bounds where training diverges."""


@dataclass(frozen=True)
class Axis:
    """What curves are drawn over."""

    name: str
    label: str
    of: Callable[[Point], float | None]


def time_axis(entries: Sequence[Entry]) -> Axis:
    """Wall-clock, in minutes where there are some."""
    longest = max((p.seconds for entry in entries for p in _points(entry)), default=0.0)
    if longest < 180:
        return Axis("time", "training time in seconds", lambda p: p.seconds)
    return Axis("time", "training time in minutes", lambda p: p.seconds / 60)


def samples_axis() -> Axis:
    """Samples of all workers, in thousands."""
    return Axis("samples", "samples of all workers, in thousands", lambda p: p.samples / 1e3)


def bytes_axis(entries: Sequence[Entry]) -> Axis:
    """Bytes of a worker, in a unit that suits."""
    most = max((p.sent_bytes or 0.0 for entry in entries for p in _points(entry)), default=0.0)
    value, unit = scaled(most)
    factor = most / value if value else 1.0

    def of(point: Point) -> float | None:
        return None if point.sent_bytes is None else point.sent_bytes / factor

    return Axis("bytes", f"{unit} sent by a worker", of)


def error_curve(
    entries: Sequence[Entry],
    axis: Axis,
    score: Score,
    target: float | None,
    look: Mapping[str, Look],
) -> Figure | None:
    """What tests found over time, samples or bytes; None where nothing has that."""
    curves = {e.label: _curve(e, axis.of, lambda p: _drawn(p, score)) for e in entries}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    ends = {label: curve[1][-1].mean() for label, curve in curves.items()}
    apart = outside(ends, _FAR) if score.unit == "%" or score.lower_is_better else set()

    def draw(axes: Any, far: bool) -> None:
        _draw_curves(axes, {k: v for k, v in curves.items() if (k in apart) == far}, look)
        if target is not None and not far:
            axes.axhline(score.drawn(target), color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
            where = {"xy": (0, score.drawn(target)), "xycoords": ("axes fraction", "data")}
            shift = {"xytext": (3, -2), "textcoords": "offset points"}
            axes.annotate("target", **where, **shift, va="top", fontsize="small")
        if score.unit == "%" and not far:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        axes.set_xlabel(axis.label)

    return panels(apart, draw, y=score.axis, far="far worse")


def gap_curve(
    entries: Sequence[Entry],
    baseline: Entry | None,
    epoch: float | None,
    score: Score,
    look: Mapping[str, Look],
) -> Figure | None:
    """How far each is behind the baseline after as many samples, in pairs of equal seeds.

    Args:
        entries: all, the baseline among them.
        baseline: None: there is none.
        epoch: samples of an epoch; None: not known.
        score: of the tests.
        look: of each entry.
    """
    if baseline is None:
        return None
    gaps = {e.label: _gap(e, baseline, score) for e in entries if e is not baseline}
    gaps = {label: gap for label, gap in gaps.items() if gap}
    if not gaps:
        return None
    per = epoch or 1e3
    curves = {
        label: (np.array([[s / per] for s in gap]), np.array([*gap.values()]))
        for label, gap in gaps.items()
    }
    apart = outside({k: float(np.abs(v[1].mean(1)).max()) for k, v in curves.items()}, _FAR)

    def draw(axes: Any, far: bool) -> None:
        _draw_curves(axes, {k: v for k, v in curves.items() if (k in apart) == far}, look)
        axes.axhline(0, color=INK, linewidth=1.2)
        axes.set_xlabel("epochs" if epoch else "samples of all workers, in thousands")

    unit = score.difference
    return panels(
        apart,
        draw,
        y=f"better (+) or worse (−)\nthan {baseline.label}, in {unit}",
        far="larger gaps",
    )


def distance_curve(entries: Sequence[Entry], look: Mapping[str, Look]) -> Figure | None:
    """How far workers are from the center, over steps; diverging runs are drawn, too."""
    curves = {
        e.label: _curve(e, lambda p: p.step, lambda p: p.distance, all_runs=True) for e in entries
    }
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    apart = outside({k: float(v[1].mean(1).max()) for k, v in curves.items()}, _DIVERGED)

    def draw(axes: Any, far: bool) -> None:
        _draw_curves(axes, {k: v for k, v in curves.items() if (k in apart) == far}, look)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer steps of a worker")

    return panels(apart, draw, y="‖x − c‖ / ‖c‖, mean of workers", far="larger distances")


def period_curve(entries: Sequence[Entry], baseline: Entry | None, score: Score) -> Figure | None:
    """What the delivered models reach over τ, × where runs diverged; None with a single period."""
    taus = sorted({entry.tau for entry in entries if entry.tau is not None})
    if len(taus) < 2:
        return None
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        lines.setdefault(entry.title, []).append(entry)
    look = looks([*lines], baseline and baseline.title)
    worst = {t: max(map(abs, _reached(each, score)), default=0.0) for t, each in lines.items()}
    apart = outside(worst, _FAR)

    def draw(axes: Any, far: bool) -> None:
        for title in (each for each in lines if (each in apart) == far):
            _draw_over_periods(axes, lines[title], taus, score, look[title])
        axes.set_xscale("log")
        axes.set_xticks(taus, [str(tau) for tau in taus])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("τ, optimizer steps between two exchanges")

    return panels(apart, draw, y=score.axis, far="far worse")


def _draw_over_periods(
    axes: Any, entries: Sequence[Entry], taus: Sequence[int], score: Score, look: Look
) -> None:
    rows = [
        (tau, values)
        for entry in entries
        if (values := _reached([entry], score))
        for tau in ([entry.tau] if entry.tau else [taus[0], taus[-1]])
    ]
    x = [tau for tau, _ in rows]
    axes.plot(x, [statistics.fmean(v) for _, v in rows], label=entries[0].title, **look.line)
    low, high = ([end(v) for _, v in rows] for end in (min, max))
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    if lost := [e.tau or taus[0] for e in entries if len(e.finished) < len(e.runs)]:
        style: dict[str, Any] = {"color": look.colour, "transform": axes.get_xaxis_transform()}
        axes.plot(lost, [0.03] * len(lost), "x", markersize=7, **style)


def _reached(entries: Sequence[Entry], score: Score) -> list[float]:
    """What is drawn of all their runs that ended."""
    return [score.drawn(value) for entry in entries for value in entry.values(final).values()]


def step_bars(times: Sequence[StepTime]) -> Figure | None:
    """What a step takes, in milliseconds: computing and waiting; what hides costs nothing."""
    known = [time for time in times if time.seconds is not None]
    if not known:
        return None
    figure, axes = plain()
    places = np.arange(len(known))[::-1]
    computing = [1e3 * (time.computing or 0.0) for time in known]
    waited = [1e3 * (time.waited or 0.0) for time in known]
    hidden = [1e3 * (time.hidden or 0.0) for time in known]
    unknown = [1e3 * time.seconds if time.computing is None else 0.0 for time in known]
    bar: dict[str, Any] = {"height": 0.36, "edgecolor": INK, "linewidth": 0.6}
    axes.barh(places + 0.18, computing, color="#56b4e9", label="computing", **bar)
    axes.barh(
        places + 0.18,
        waited,
        left=computing,
        color="#e69f00",
        hatch="//",
        label="waited for exchanges",
        **bar,
    )
    if any(unknown):
        axes.barh(places + 0.18, unknown, color=GRID, label="not told apart", **bar)
    if any(hidden):
        bar = {**bar, "height": 0.2}
        axes.barh(
            places - 0.14,
            hidden,
            color="#009e73",
            hatch="\\\\",
            label="exchange hidden behind steps",
            **bar,
        )
    names = [("~ " if time.estimated else "") + time.label for time in known]
    axes.set_yticks(places, [name.replace(" (", "\n(") for name in names])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds of an optimizer step")
    legend(figure)
    return figure


def bandwidth_curve(found: BreakEven, look: Mapping[str, Look]) -> Figure:
    """What a run takes by the model, over the bandwidth."""
    rates = [rate for rate in (found.if_hidden, found.if_awaited) if rate and np.isfinite(rate)]
    rates += [found.measured_rate or 100e6]
    axis = np.geomspace(min(rates) / 10, max(rates) * 10, 80)
    figure, axes = plain()
    mine, other, compute = found.method, found.other, found.compute
    own = np.array([mine.seconds(compute, rate, hides=bool(mine.hides)) for rate in axis])
    awaited, hidden = (
        np.array([other.seconds(compute, rate, hides=h) for rate in axis]) for h in (False, True)
    )
    unit, name_of_unit = (60, "minutes") if awaited.max() > 600 else (1, "seconds")
    own, awaited, hidden = own / unit, awaited / unit, hidden / unit
    style = {**look[found.label].line, "marker": None}
    axes.plot(axis / 1e6, own, label=found.label, **style)
    axes.fill_between(axis / 1e6, hidden, awaited, color=INK, alpha=0.15, linewidth=0)
    name = found.baseline
    axes.plot(axis / 1e6, awaited, color=INK, label=f"{name}, all of its sums awaited")
    axes.plot(axis / 1e6, hidden, "--", color=INK, label=f"{name}, all hidden that can be")
    if found.measured_rate is not None:
        axes.axvline(found.measured_rate / 1e6, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "measured",
            (found.measured_rate / 1e6, 1),
            xytext=(3, -2),
            va="top",
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize="small",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for each in (axes.xaxis, axes.yaxis):
        _plain_numbers(each)
    axes.set_xlabel("bandwidth of a worker in Mbit/s")
    axes.set_ylabel(f"{name_of_unit} {'to the target' if found.to_target else 'of the whole run'}")
    legend(figure, columns=1)
    return figure


def _points(entry: Entry) -> list[Point]:
    return [point for run in entry.finished.values() for point in run.points]


def _drawn(point: Point, score: Score) -> float | None:
    return None if point.score is None else score.drawn(point.score)


def _curve(
    entry: Entry,
    x: Callable[[Point], float | None],
    y: Callable[[Point], float | None],
    *,
    all_runs: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Both by test and seed: see [Note: curves]."""
    runs = (entry.runs if all_runs else entry.finished).values()
    rows = [[(x(p), y(p)) for p in run.points] for run in runs]
    rows = [[pair for pair in row if None not in pair and np.isfinite(pair).all()] for row in rows]
    length = min((len(row) for row in rows), default=0)
    found = np.array([row[:length] for row in rows], float).reshape(len(rows), length, 2)
    return found[..., 0].T, found[..., 1].T


def _draw_curves(
    axes: Any, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], look: Mapping[str, Look]
) -> None:
    for label, (x, y) in curves.items():
        style = look[label]
        every = max(1, len(x) // 12)
        axes.plot(x.mean(1), y.mean(1), label=label, markevery=every, **style.line)
        if y.shape[1] > 1:
            range_ = (y.min(1), y.max(1))
            axes.fill_between(x.mean(1), *range_, color=style.colour, alpha=0.15, linewidth=0)


def _gap(entry: Entry, baseline: Entry, score: Score) -> dict[int, list[float]]:
    """By samples at which all pairs were tested, the gain of each seed."""
    pairs = [
        (run, baseline.finished[s]) for s, run in entry.finished.items() if s in baseline.finished
    ]
    gains = [_gains(run, other, score) for run, other in pairs]
    common = set.intersection(*map(set, gains)) if gains else set()
    return {samples: [gain[samples] for gain in gains] for samples in sorted(common)}


def _gains(run: Result, other: Result, score: Score) -> dict[int, float]:
    others = {point.samples: point.score for point in tested(other)}
    return {
        point.samples: score.gain(point.score, others[point.samples])
        for point in tested(run)
        if point.samples in others
    }


def _plain_numbers(axis: Any, subs: Sequence[float] = (1.0,)) -> None:
    """On a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def epoch_of(entries: Sequence[Entry], epochs: float | None) -> float | None:
    """Samples of an epoch, by what the longest run trained on."""
    most = [run.samples for entry in entries for run in entry.finished.values() if run.samples]
    return statistics.median(most) / epochs if most and epochs else None
