"""Medians, percentiles, and ratios of runs that stood next to each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def median_ratio(values: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Median of the ratios within a repetition, over repetitions that have both; None: none has.

    Args:
        values: by repetition.
        others: by repetition.
    """
    ratios = [value / others[key] for key, value in values.items() if key in others]
    return statistics.median(ratios) if ratios else None
