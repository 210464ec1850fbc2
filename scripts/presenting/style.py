"""How figures look: Okabe and Ito's colours, told apart in grey by markers and line styles.

Ink and paper are two colours that nothing else has, so that a page can put its own in their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, PAPER, GRID = "#1b1c1d", "#fefefe", "#c9cacb"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS, _DASHES = "oDv^PX", ("-", "--", "-.", ":")
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": PAPER,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE = (4.4, 3.5)
"""Inches of a figure, which a phone shows without making it smaller."""


@dataclass(frozen=True)
class Look:
    """Of one entry, the same in all figures."""

    colour: str
    marker: str
    dash: str

    @property
    def line(self) -> dict[str, Any]:
        """For a curve."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


def looks(labels: Sequence[str], baseline: str | None) -> dict[str, Look]:
    """Of all labels; the baseline has the colour of the text."""
    others = [label for label in labels if label != baseline]
    found = {
        label: Look(
            _COLOURS[number % len(_COLOURS)],
            _MARKERS[number % len(_MARKERS)],
            _DASHES[(number + number // len(_COLOURS)) % len(_DASHES)],
        )
        for number, label in enumerate(others)
    }
    return found if baseline is None else {baseline: Look(INK, "s", "-"), **found}


@contextmanager
def styled() -> Iterator[None]:
    """Within it, figures are drawn and written like this."""
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": "easgd"}):
        yield


def plain() -> tuple[Figure, Any]:
    """A figure and its axes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: Figure, columns: int = 2) -> None:
    """Of all axes, below them, where it hides nothing."""
    known = [each.get_legend_handles_labels() for each in figure.axes[::-1]]
    handles, labels = ([item for each in known for item in each[i]] for i in (0, 1))
    style: dict[str, Any] = {"handlelength": 3, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def write(figure: Figure, folder: Path, name: str) -> str:
    """Write it as PNG and SVG; what a page takes of it."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.set_layout_engine("none")  # what it found holds for the other format, too
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(text.getvalue())
    return _inlined(text.getvalue(), name)


def _inlined(svg: str, name: str) -> str:
    """With the page's ink and paper, its own names, and as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for mark in (' id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, own in ((INK, "currentColor"), (PAPER, "var(--paper)"), (GRID, "var(--grid)")):
        svg = svg.replace(colour, own)
    return svg


def outside(extents: Mapping[str, float], most: float) -> set[str]:
    """Those that would squash the others: all above the first gap of more than ``most`` times."""
    ordered = sorted((value, label) for label, value in extents.items() if value > 0)
    for number, ((before, _), (after, _)) in enumerate(pairwise(ordered), 1):
        if after > most * before:
            return {label for _, label in ordered[number:]}
    return set()


def panels(apart: set[str], draw: Callable[[Any, bool], None], *, y: str, far: str) -> Figure:
    """One panel, or two below each other where some entries stand apart from the others.

    Args:
        apart: labels of those.
        draw: called with axes and whether these are of those.
        y: label of the axis.
        far: title of the panel of those.
    """
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 1.5 * bool(apart)), layout="constrained")
    if not apart:
        axes = figure.add_subplot()
        draw(axes, False)
        axes.set_ylabel(y)
        legend(figure)
        return figure
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    draw(above, True)
    draw(below, False)
    above.set_title(far)
    above.set_xlabel("")
    figure.supylabel(y, fontsize="medium")
    legend(figure)
    return figure
