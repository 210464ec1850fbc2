"""The curves of a run as a picture: over steps, and over time where that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seeing.rows import Curve, Rows

Panel = tuple[str, dict[str, Curve]]


def draw(folder: Path) -> Path | None:
    """Draw ``curves.png`` in a run's folder, of what it has logged there.

    Returns:
        The picture; None if nothing was logged.
    """
    rows = Rows(folder)
    panels = choose_panels(rows)
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = bool(rows.seconds([0]))
    figure = Figure(figsize=(3.6 * len(panels), 5.6 if timed else 3), layout="constrained")
    for number, panel in enumerate(panels, 1):
        lines = 1 + timed
        _draw(figure.add_subplot(lines, len(panels), number), panel, lambda steps: steps, "steps")
        if timed:
            below = figure.add_subplot(lines, len(panels), len(panels) + number)
            _draw(below, panel, rows.seconds, "seconds")
    path = folder / "curves.png"
    FigureCanvasAgg(figure).print_png(path)
    return path


def choose_panels(rows: Rows) -> list[Panel]:
    """What is drawn together: losses, other numbers of the module, distance, waits."""
    own = {n: c for n, c in rows.of_the_module().items() if not n.startswith("test")}
    distance = rows.curves.get("easgd/consensus_distance", Curve())
    waits = rows.per_worker("easgd/worker_wait_seconds")
    panels = [
        ("loss", {name: curve for name, curve in own.items() if "loss" in name}),
        ("metrics", {n: c for n, c in own.items() if "loss" not in n and "lr" not in n}),
        ("distance ‖x − c‖/‖c‖", {"worker 0": distance} if distance.steps else {}),
        ("waited, in seconds", {f"worker {rank}": curve for rank, curve in enumerate(waits)}),
    ]
    return [(title, curves) for title, curves in panels if curves]


def _draw(axes: Any, panel: Panel, place: Callable[[list[int]], Sequence[float]], x: str) -> None:
    title, curves = panel
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    for name, curve in curves.items():
        mark = "o-" if len(curve.steps) < 20 else "-"
        axes.plot(place(curve.steps), curve.values, mark, label=name, linewidth=1.2, markersize=3)
    if len(curves) <= 10:
        axes.legend(fontsize="x-small", frameon=False)
    axes.grid(alpha=0.3)
