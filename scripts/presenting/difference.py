"""Differences between two entries, seed by seed, and what may be said of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ENOUGH = 3
"""Seeds that a claim needs."""


@dataclass(frozen=True)
class Spread:
    """A number of several seeds: mean and standard deviation."""

    values: Sequence[float]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def count(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Of all."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Between seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def is_claim(self) -> bool:
        """Whether there are enough seeds to say anything."""
        return self.count >= ENOUGH

    @property
    def is_clear(self) -> bool:
        """Whether it is a difference from 0 beyond the spread, of enough seeds."""
        return self.is_claim and abs(self.mean) > (self.deviation or 0.0)

    def shown(self, digits: int, *, signed: bool = False, absolute: bool = False) -> str:
        """Mean ± standard deviation."""
        if not self.values:
            return "-"
        mean = abs(self.mean) if absolute else self.mean
        text = f"{mean:{'+' if signed else ''}.{digits}f}".replace("-", "−")
        return text if self.deviation is None else f"{text} ± {self.deviation:.{digits}f}"


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> list[tuple[float, float]]:
    """What both have a value of, by seed."""
    return [(value, others[seed]) for seed, value in values.items() if seed in others]


def saved(values: Mapping[int, float], others: Mapping[int, float]) -> Spread:
    """By how many percent each value is below that of the other with the same seed."""
    pairs = paired(values, others)
    return Spread([100 * (1 - value / other) for value, other in pairs if other])


def verdict(spread: Spread) -> str:
    """What may be said of a difference; nothing where it is clear."""
    if not spread:
        return ""
    if not spread.is_claim:
        return f"no claim with {spread.count} seed{'s' * (spread.count > 1)}"
    return "" if spread.is_clear else "no difference beyond the spread"
