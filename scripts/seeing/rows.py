"""The rows that a run has logged, from its folder alone."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SECONDS = "easgd/seconds"
"""Since training began, in rows that EASGDMonitor has added to."""


@dataclass
class Curve:
    """Values of one name, at their steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Rows:
    """What the CSV logger has written, by name.

    Args:
        folder: of the run, with a ``metrics.csv`` somewhere in it, perhaps not yet.
    """

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
        self.path = found[-1] if found else None
        """The newest file; None if there is none."""
        self.curves: dict[str, Curve] = {}
        for row in _read(self.path) if self.path else []:
            self._take(row)

    def _take(self, row: dict[str, str]) -> None:
        if not row.get("step"):
            return
        for name, value in row.items():
            if value and name != "step":
                curve = self.curves.setdefault(name, Curve())
                curve.steps.append(int(row["step"]))
                curve.values.append(float(value))

    def latest(self, name: str) -> float | None:
        """The value that was logged last; None if there is none."""
        return self.curves[name].values[-1] if name in self.curves else None

    def per_worker(self, name: str) -> list[Curve]:
        """Curves of a counter of each worker, in rank order."""
        names = (f"{name}/{rank}" for rank in range(len(self.curves)))
        return [self.curves[key] for key in names if key in self.curves]

    def of_the_module(self) -> dict[str, Curve]:
        """What the module itself has logged, the losses first."""
        own = [name for name in self.curves if name != "epoch" and not name.startswith("easgd/")]
        return {name: self.curves[name] for name in sorted(own, key=lambda n: ("loss" not in n, n))}

    def seconds(self, steps: Sequence[int]) -> list[float]:
        """When these steps were taken, between the rows that tell; empty if none does.

        A run that goes on begins to count anew, and is put behind what was before.
        """
        known = self.curves.get(SECONDS)
        if known is None:
            return []
        begins = np.diff(known.values, prepend=0.0) < 0
        before = np.where(begins, np.roll(known.values, 1), 0.0).cumsum()
        return np.interp(steps, known.steps, before + known.values).tolist()


def _read(path: Path) -> list[dict[str, str]]:
    """All whole rows; the last may be half written, and the file be replaced meanwhile."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
    return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(whole)]
