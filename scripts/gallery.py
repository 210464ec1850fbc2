"""Draw how the schedules of conf/vary go, from real runs on digits.

python scripts/gallery.py                     outputs/gallery/schedules.png, in a few minutes
python scripts/gallery.py --folder runs       finished runs are kept there, and not done again
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALPHA, DISTANCE = "alpha", "consensus_distance"


@dataclass(frozen=True)
class Panel:
    """A file of conf/vary, and the curves that it is drawn with."""

    name: str
    title: str
    curves: tuple[str, ...]
    """Of telemetry, left axis first."""
    overrides: tuple[str, ...] = ()
    target: float | None = None
    """A line that the last curve should follow."""


PANELS = (
    Panel("linear", "Linear: τ", ("tau",)),
    Panel("cosine", "Cosine: β, as α = β/p", (ALPHA,)),
    Panel("exponential", "Exponential: τ", ("tau",)),
    Panel("steps", "Steps: τ", ("tau",)),
    Panel("outer_cosine", "Cosine: outer rate of DiLoCo", ("outer_lr",), ("strategy=diloco",)),
    Panel("anneal", "Anneal: ρ, as α = ηρ", (ALPHA,), ("schedule=constant", "optimizer.lr=0.1")),
    Panel("consensus_target", "ConsensusTarget: β, as α = β/p", (ALPHA, DISTANCE), (), 0.1),
    Panel("adaptive_period", "AdaptivePeriod: τ", ("tau",)),
)
LABELS = {"tau": "τ (steps)", ALPHA: "α", "outer_lr": "outer_lr", DISTANCE: "‖x − c‖ / ‖c‖"}


def train(panel: Panel, folder: Path, overrides: Sequence[str]) -> list[dict[str, str]]:
    """The rows that a run of scripts/train.py logs, one a step; it is done if it was not yet."""
    run = folder / panel.name
    if not (run / "report.json").exists():
        options = ["logger=csv", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"]
        options += [
            "test=false",
            "trainer.limit_val_batches=0",
            "trainer.enable_checkpointing=false",
        ]
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"vary={panel.name}"]
        command += [*options, *panel.overrides, *overrides, f"hydra.run.dir={run.resolve()}"]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
    (log,) = run.rglob("metrics.csv")
    with log.open() as file:
        return list(csv.DictReader(file))


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def curve(rows: Sequence[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a counter, from the first exchange on."""
    column = f"easgd/{name}"
    known = {
        int(row["step"]): float(row[column])  # the last of a step that has several rows
        for row in rows
        if row.get(column) and float(row["easgd/exchanges"]) > 0
    }
    return list(known), list(known.values())


def draw(runs: Sequence[tuple[Panel, Sequence[dict[str, str]]]], path: Path) -> None:
    """A picture with a panel for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(runs) + 3) // 4
    figure = Figure(figsize=(13, 2.7 * rows), layout="constrained")
    for position, (panel, logged) in enumerate(runs):
        _draw_panel(figure.add_subplot(rows, 4, position + 1), panel, logged)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _draw_panel(axes: Any, panel: Panel, logged: Sequence[dict[str, str]]) -> None:
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("optimizer steps")
    for number, name in enumerate(panel.curves):
        side, color = (axes, "C0") if number == 0 else (axes.twinx(), "C1")
        side.plot(*curve(logged, name), drawstyle="steps-post", color=color, linewidth=1.5)
        side.set_ylabel(LABELS[name], color=color)
        side.set_ylim(bottom=0)
    if panel.target is not None:
        side.axhline(panel.target, color=color, linestyle=":", linewidth=1)


def main() -> None:
    """Parse the command line, train, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/gallery"), help="of the runs")
    parser.add_argument("--picture", type=Path, help="default: schedules.png in that folder")
    parser.add_argument("overrides", nargs="*", help="of scripts/train.py, for all runs")
    options = parser.parse_args()
    runs = []
    for panel in PANELS:
        print(f"  {panel.name}", flush=True)
        runs.append((panel, train(panel, options.folder, options.overrides)))
    picture = options.picture or options.folder / "schedules.png"
    draw(runs, picture)
    print(f"  {picture}")


if __name__ == "__main__":
    main()
