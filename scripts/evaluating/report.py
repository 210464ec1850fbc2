"""What the models of a checkpoint reached: as a table for a terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sweeping import aligned


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one checkpoint."""

    checkpoint: str
    step: int | None
    """Optimizer steps that had been taken."""
    tested: Mapping[str, Mapping[str, float]]
    """What each model's test logged."""
    missing: Mapping[str, str]
    """Models that are not there, and why."""
    batches: int
    """From which BatchNorm was recalibrated; 0: it was not."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def table(self) -> str:
        """A row for each model, with whatever its test logged."""
        names = list(dict.fromkeys(name for found in self.tested.values() for name in found))
        rows: list[list[Any]] = [[f"step {self.step}", *names]]
        for model, found in self.tested.items():
            rows.append([model, *(found.get(name) for name in names)])
        notes = [f"  Left out: {model}. Because {why}." for model, why in self.missing.items()]
        if self.batches:
            notes.append(f"  BatchNorm was recalibrated on {self.batches} training batches.")
        return "\n".join([aligned(rows), *[""] * bool(notes), *notes])
