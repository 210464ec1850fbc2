"""What settings reached against the bytes that they sent, with Pareto's front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from reporting.settings import Metric, Setting, front

_FAR = 3.0
"""Beyond the quartile by so many times the distance of the quartiles, a setting lies outside."""
_APART, _WIDTH = 1.04, 1.25
"""By what those that sent the same are set apart, and all of them together at most."""


def draw(settings: Sequence[Setting], metric: Metric, chosen: Setting | None) -> Figure:
    """A picture of all settings that sent something, the chosen one marked."""
    known = [s for s in settings if s.reached and s.megabytes]
    places = _beside(known)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    low, high = _limits([s.mean for s in known])
    inside = [s for s in known if low <= s.mean <= high]
    _draw_all(axes, inside, places)
    named = _draw_front(axes, [s for s in front(known, metric) if s in inside], places)
    if chosen is not None and chosen in inside:
        place = [places[id(chosen)]], [chosen.mean]
        ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot(*place, "o", color="#d55e00", markersize=15, label="recommended", **ring)
    if outside := [s for s in known if s not in inside]:
        _draw_outside(axes, outside, metric)
    if sent := _sent_under_ddp(settings):
        axes.axvline(sent, color="black", linestyle=":", linewidth=1.2, label="what DDP sends")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("MB sent by worker 0 in a run (logarithmic)")
    axes.set_ylabel(metric.label)
    axes.grid(alpha=0.3)
    style: dict[str, Any] = {"fontsize": "small", "frameon": False}
    figure.legend(loc="outside lower center", ncols=2, **style)
    blank = [axes.plot([], [], " ")[0] for _ in named]
    style |= {"loc": "outside right upper", "handlelength": 0, "handletextpad": 0}
    figure.legend(blank, named, title="front", **style)
    return figure


def _draw_all(axes: Any, settings: Sequence[Setting], places: Mapping[int, float]) -> None:
    whole = "a setting: mean of seeds and standard error; those of equal bytes side by side"
    lost = "one that lost a run: mean of those that are left"
    for is_whole, label, fill in ((True, whole, "0.45"), (False, lost, "white")):
        shown = [setting for setting in settings if setting.is_whole == is_whole]
        if shown:
            axes.errorbar(
                *([places[id(s)] for s in shown], [s.mean for s in shown]),
                yerr=[s.error or 0.0 for s in shown],
                fmt="o",
                color="0.45",
                markerfacecolor=fill,
                markersize=4,
                capsize=2,
                linewidth=1,
                zorder=3,
                label=label,
            )


def _beside(settings: Sequence[Setting]) -> dict[int, float]:
    """Where each is drawn: those that sent the same stand beside each other."""
    alike: dict[str, list[Setting]] = {}
    for setting in settings:
        alike.setdefault(f"{setting.megabytes:.3g}", []).append(setting)
    return {
        id(setting): (setting.megabytes or 0.0)
        * min(_APART, _WIDTH ** (1 / len(those))) ** (number - (len(those) - 1) / 2)
        for those in alike.values()
        for number, setting in enumerate(those)
    }


def _draw_front(axes: Any, best: Sequence[Setting], places: Mapping[int, float]) -> list[str]:
    """Draw it, numbered; the number and the name of each."""
    x, y = [places[id(s)] for s in best], [s.mean for s in best]
    label = "front: none is better with fewer bytes"
    axes.plot(x, y, "s-", color="#0072b2", drawstyle="steps-post", linewidth=1.8, label=label)
    for number, place in enumerate(zip(x, y, strict=True), 1):
        text = axes.annotate(
            *(str(number), place),
            xytext=(-9, 7),
            textcoords="offset points",
            ha="center",
            color="#0072b2",
            weight="bold",
            zorder=5,
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return [f"{number}  {_short(setting)}" for number, setting in enumerate(best, 1)]


def _draw_outside(axes: Any, outside: Sequence[Setting], metric: Metric) -> None:
    """At the edge, for they would squash the others."""
    edge, mark = (0.02, "v") if metric.better == "max" else (0.98, "^")
    means = sorted(setting.mean for setting in outside)
    shown = [metric.shown(mean) for mean in dict.fromkeys((means[0], means[-1]))]
    label = f"far outside: {' to '.join(shown)}"
    places = [setting.megabytes for setting in outside]
    axes.plot(
        *(places, [edge] * len(places)),
        marker=mark,
        color="black",
        linestyle="none",
        clip_on=False,
        transform=axes.get_xaxis_transform(),
        label=label,
    )


def _sent_under_ddp(settings: Sequence[Setting]) -> float | None:
    """What DDP sends in such a run; None where that is not one amount."""
    runs = [run for setting in settings for run in setting.runs]
    sent = {run.report["ddp_bytes_sent"] for run in runs if run.report} - {None}
    return float(sent.pop()) / 1e6 if len(sent) == 1 else None


def _short(setting: Setting) -> str:
    """Its name without the groups of the keys."""
    values = [(key.split(".")[-1], value) for key, value in setting.values.items() if value]
    letters = {"tau": "τ", "beta": "β", "alpha": "α", "rho": "ρ"}
    return " ".join(f"{letters.get(key, key)}={value}" for key, value in values)


def _limits(means: Sequence[float]) -> tuple[float, float]:
    if not means:
        return 0.0, 1.0
    low, high = map(float, np.quantile(means, [0.25, 0.75]))
    far = _FAR * (high - low)
    return (low - far, high + far) if far else (-np.inf, np.inf)
