"""A run on the screen: how far it is, what it reached, what exchanges cost, who is waited for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from going_on import taken
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from seeing.rows import Curve, Rows

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_TROUBLE = ("error", "warning", "traceback", "waited")
_LINES_OF_LOGS = 6


_ENDS = {
    "report.json": "ended",
    "error.log": "failed, see error.log",
    "stopped.log": "stopped, see stopped.log",
}


def end(folder: Path) -> str:
    """How a run ended; empty while it goes on, also if an earlier start of it has ended."""
    last_sign = max(map(_written, [*folder.rglob("metrics.csv"), folder / "steps"]))
    ends = {how: _written(folder / name) for name, how in _ENDS.items()}
    return next((how for how, at in ends.items() if at and at >= last_sign), "")


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def screen(folder: Path) -> RenderableType:
    """What is known of a run."""
    rows = Rows(folder)
    parts: list[RenderableType] = [Text(_state(folder, rows), style="bold")]
    parts += [
        _table(lines) for lines in (_numbers(rows), _exchanges(rows), _report(folder)) if lines
    ]
    parts += [Text(line, style="yellow") for line in _said(folder)]
    return Group(*parts)


def _state(folder: Path, rows: Rows) -> str:
    if how := end(folder):
        return f"{folder}: {how}"
    if rows.path is None:
        return f"{folder}: nothing is logged yet"
    age = time.time() - rows.path.stat().st_mtime
    return f"{folder}: runs, at step {_step(folder, rows)}; the latest row is {age:.0f} s old"


def _step(folder: Path, rows: Rows) -> int:
    if (step := taken(folder)) is not None:  # of train.py, at every step
        return step
    return max((curve.steps[-1] for curve in rows.curves.values()), default=-1) + 1


def _numbers(rows: Rows) -> list[tuple[str, str]]:
    epoch = rows.latest("epoch")
    shown = [] if epoch is None else [("epoch", f"{epoch:.0f}")]
    return shown + [
        (name, f"{curve.values[-1]:<10.5g} {sparkline(curve.values)}")
        for name, curve in rows.of_the_module().items()
    ]


def _exchanges(rows: Rows) -> list[tuple[str, str]]:
    latest = {
        name: rows.latest(f"easgd/{name}")
        for name in ("tau", "exchanges", "bytes_sent", "ddp_bytes_sent", "consensus_distance")
    }
    if latest["exchanges"] is None:
        return []
    seconds = rows.latest("easgd/seconds") or 0.0
    shown = [("exchanges", f"{latest['exchanges']:.0f}, τ = {latest['tau']:.0f}")]
    if latest["ddp_bytes_sent"]:
        sent = latest["bytes_sent"] or 0.0
        share = 100 * sent / latest["ddp_bytes_sent"]
        shown.append(("sent", f"{sent / 1e6:.2f} MB, {share:.3g} % of DDP's"))
    distance = rows.curves["easgd/consensus_distance"].values
    shown.append(("distance", f"{distance[-1]:<10.3g} {sparkline(distance)}"))
    waited = rows.per_worker("easgd/worker_wait_seconds")
    awaited = rows.per_worker("easgd/worker_awaited_seconds")
    return shown + [
        (f"worker {rank}", _waits(wait, told, seconds))
        for rank, (wait, told) in enumerate(zip(waited, awaited, strict=False))
    ]


def _waits(waited: Curve, awaited: Curve, seconds: float) -> str:
    now, told = waited.values[-1], awaited.values[-1]
    return f"waited {now:.2f} s, was waited for {told:.2f} s, of {seconds:.1f} s"


def _report(folder: Path) -> list[tuple[str, str]]:
    """What the report has that the rows have not."""
    if end(folder) != "ended":
        return []
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    names = ("strategy", "strength", "learning_rate", "model", "data", "workers", "steps")
    names += ("train_seconds", "samples_per_second", "checkpoint")
    values = {name: found.get(name) for name in names}
    shown = {name: value for name, value in values.items() if value is not None}
    return [(n, f"{v:.5g}" if isinstance(v, float) else str(v)) for n, v in shown.items()]


def _said(folder: Path) -> list[str]:
    """The latest lines of the workers' logs that speak of trouble."""
    lines = [
        f"{path.stem}: {line.strip()}"
        for path in sorted(folder.glob("worker*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if any(word in line.lower() for word in _TROUBLE)
    ]
    return lines[-_LINES_OF_LOGS:]


def _table(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line, of at most 40 characters; nothing for what is not finite."""
    width = min(_WIDTH, len(values))
    shown = [values[int((i + 1) * len(values) / width) - 1] for i in range(width)]
    finite = [value for value in shown if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((value - low) * scale)] if abs(value) < float("inf") else " "
        for value in shown
    )
