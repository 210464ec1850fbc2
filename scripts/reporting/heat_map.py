"""Accuracy over τ and β, with the border beyond which EASGD is not stable."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from reporting.runs import Run
from reporting.settings import Metric, Setting

_AXES = ("tau", "beta", "alpha", "rho")
MOST = 6
"""Panels that a picture has room for."""
_COLUMNS = 3
_FAR = 3.0
"""Beyond the quartile by so many times the distance of the quartiles, a value has no colour."""


@dataclass(frozen=True)
class Panel:
    """What is drawn together: settings that differ in τ and β alone."""

    title: str
    cells: dict[tuple[float, float], list[Run]]
    """Runs, by τ and β."""

    @property
    def taus(self) -> list[float]:
        """All that there are, in order."""
        return sorted({tau for tau, _ in self.cells})

    @property
    def betas(self) -> list[float]:
        """All that there are, in order."""
        return sorted({beta for _, beta in self.cells})

    @property
    def border(self) -> float | None:
        """Of all its runs; None where that is not one."""
        ended = [run for runs in self.cells.values() for run in runs if run.problem is None]
        borders = {run.border for run in ended}
        return borders.pop() if len(borders) == 1 else None

    def missing(self) -> list[str]:
        """The cells that no run is of."""
        where = f" of {self.title}" if self.title else ""
        cells = [(tau, beta) for tau in self.taus for beta in self.betas]
        return [f"τ={t:g} β={b:g}{where}" for t, b in cells if (t, b) not in self.cells]


def panels(settings: Sequence[Setting]) -> list[Panel]:
    """The panels that have at least two cells, those with the most first."""
    found: dict[str, Panel] = {}
    for setting in settings:
        others = {k: v for k, v in setting.values.items() if k.split(".")[-1] not in _AXES}
        title = " ".join(f"{k}={v}" for k, v in others.items() if v)
        for run in setting.runs:
            if run.tau and run.beta is not None:
                panel = found.setdefault(title, Panel(title, {}))
                panel.cells.setdefault((run.tau, round(run.beta, 6)), []).append(run)
    several = [panel for panel in found.values() if len(panel.cells) > 1]
    return sorted(several, key=lambda panel: -len(panel.cells))


def draw(chosen: Sequence[Panel], metric: Metric) -> Figure:
    """A picture with the first panels."""
    chosen = chosen[:MOST]
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    widest = max(len(panel.taus) for panel in chosen)
    tallest = max(len(panel.betas) for panel in chosen)
    size = (columns * (2.2 + 0.75 * max(widest, 4)), rows * (1.8 + 0.6 * max(tallest, 4)))
    figure = Figure(figsize=size, layout="constrained")
    means = [m for panel in chosen for runs in panel.cells.values() for m in _mean(runs, metric)]
    low, high = _limits(means)
    colours = "viridis" if metric.better == "max" else "viridis_r"
    all_axes = []
    for number, panel in enumerate(chosen, 1):
        axes = figure.add_subplot(rows, columns, number)
        mesh = _draw_panel(axes, panel, metric, cmap=colours, vmin=low, vmax=high)
        all_axes.append(axes)
    beyond = min(means, default=low) < low, max(means, default=high) > high
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
    label = f"{metric.label}, mean of seeds"
    figure.colorbar(mesh, ax=all_axes, label=label, extend=extend.get(beyond, "neither"))
    return figure


def _draw_panel(axes: Any, panel: Panel, metric: Metric, **colours: Any) -> Any:
    x, y = _edges(panel.taus), [row - 0.5 for row in range(len(panel.betas) + 1)]
    values = np.full((len(panel.betas), len(panel.taus)), np.nan)
    for (tau, beta), runs in panel.cells.items():
        for mean in _mean(runs, metric):
            values[panel.betas.index(beta), panel.taus.index(tau)] = mean
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(values), edgecolors="white", **colours)
    for row, beta in enumerate(panel.betas):
        for column, tau in enumerate(panel.taus):
            runs = panel.cells.get((tau, beta), [])
            corner, width = (x[column], row - 0.5), x[column + 1] - x[column]
            _write(axes, corner, width, runs, metric, mesh, at=(tau, row))
    axes.set_xscale("log")
    axes.set_xticks(panel.taus, [f"{tau:g}" for tau in panel.taus])
    axes.set_yticks(range(len(panel.betas)), [f"{beta:.3g}" for beta in panel.betas])
    axes.minorticks_off()
    axes.set_xlabel("τ in optimizer steps (logarithmic)")
    axes.set_ylabel("β = pα, pull on the center in an exchange")
    axes.set_title(panel.title, fontsize="medium", pad=22)
    axes.set_xlim(x[0], x[-1])
    if panel.border is not None:
        _draw_border(axes, panel.border, panel.betas)
    return mesh


def _write(
    axes: Any,
    corner: tuple[float, float],
    width: float,
    runs: Sequence[Run],
    metric: Metric,
    mesh: Any,
    *,
    at: tuple[float, float],
) -> None:
    """The number of a cell; hatched where its runs have none, or it has no runs."""
    means, style = _mean(runs, metric), {"ha": "center", "va": "center", "fontsize": "small"}
    if not means:
        hatch = {"hatch": "////", "edgecolor": "0.6"} if runs else {}
        shade: dict[str, Any] = {"facecolor": "0.93" if runs else "white", **hatch}
        axes.add_patch(Rectangle(corner, width, 1.0, linewidth=0, **shade))
        text = axes.text(*at, "no result" if runs else "no run", color="0.2", **style)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        return
    ended = sum(metric.of(run) is not None for run in runs)
    some = f"\n{ended} of {len(runs)}" if ended < len(runs) else ""
    red, green, blue, _ = mesh.cmap(mesh.norm(means[0]))
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
    axes.text(*at, metric.shown(means[0]) + some, color="white" if dark else "black", **style)


def _draw_border(axes: Any, border: float, betas: Sequence[float]) -> None:
    """Between the rows that it lies between, or at the edge."""
    row = sum(beta < border for beta in betas) - 0.5
    axes.set_ylim(-0.5 - 0.1 * (row < 0), len(betas) - 0.5 + 0.1 * (row > len(betas) - 1))
    label = f"border of stability, β = 2p/(p + 1) = {border:.3g}"
    line = axes.axhline(row, color="black", linestyle="--", linewidth=2, label=label)
    line.set_path_effects([withStroke(linewidth=4, foreground="white")])
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99)}
    axes.legend(**place, frameon=False, fontsize="small", handlelength=3)


def _mean(runs: Sequence[Run], metric: Metric) -> list[float]:
    """One number, or none."""
    reached = [value for run in runs if (value := metric.of(run)) is not None]
    return [statistics.fmean(reached)] if reached else []


def _limits(means: Sequence[float]) -> tuple[float, float]:
    """Of the colours, which one that diverged must not use up."""
    low, high = np.quantile(means, [0.25, 0.75]) if means else (0.0, 1.0)
    far = _FAR * (high - low)
    near = [mean for mean in means if low - far <= mean <= high + far]
    return min(near, default=0.0), max(near, default=1.0)


def _edges(taus: Sequence[float]) -> list[float]:
    """Between the values on a logarithmic axis, and as far beyond the first and the last."""
    places = np.log2(taus)
    between = (places[1:] + places[:-1]) / 2
    first, last = places[0] - 1, places[-1] + 1
    if len(places) > 1:
        first, last = 2 * places[0] - between[0], 2 * places[-1] - between[-1]
    return list(map(float, np.exp2([first, *between, last])))
