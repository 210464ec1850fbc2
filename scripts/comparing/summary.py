"""Medians over repetitions, and what they are to each other."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comparing.networks import Setting
from comparing.result import Result, Speed
from comparing.statistics import median_ratio

LIMIT = "limit"
"""The contender that never exchanges anything."""


@dataclass(frozen=True)
class Summary:
    """One contender in one setting: medians over its repetitions."""

    network: str | None
    hosts: int
    stall: float
    slow: float
    contender: str
    repetitions: int
    samples_per_second: float
    lowest: float
    highest: float
    ratios: dict[str, float]
    """Samples/s to those of each contender: the median of the ratios within a repetition."""
    bytes_per_step: float
    bytes_to_ring: float | None
    period: float | None
    """Steps between two exchanges."""
    wait_p50: float | None
    wait_p95: float | None
    waits_are_counted: bool
    """Whether exchanges were timed; else waits are what steps took longer than the limit's."""
    peak_bytes: float

    @property
    def setting(self) -> Setting:
        """Where."""
        return Setting(self.network, self.hosts, self.stall, self.slow)


def summarize(results: Iterable[Result]) -> list[Summary]:
    """A summary of each contender in each setting, in the order of their first results."""
    by_setting: dict[Setting, dict[str, list[Result]]] = {}
    for result in results:
        of_setting = by_setting.setdefault(result.setting, {})
        of_setting.setdefault(result.contender, []).append(result)
    return [
        _summary(found, by_contender)
        for by_contender in by_setting.values()
        for found in by_contender.values()
    ]


def _summary(found: Sequence[Result], by_contender: dict[str, list[Result]]) -> Summary:
    first, speeds = found[0], [_speed(result) for result in found]
    rates = [speed.samples_per_second for speed in speeds]
    counted = speeds[0].wait_p50 is not None
    p50, p95 = _counted(speeds) if counted else _beyond_limit(found, by_contender.get(LIMIT, []))
    return Summary(
        network=first.network,
        hosts=first.hosts,
        stall=first.stall,
        slow=first.slow,
        contender=first.contender,
        repetitions=len(found),
        samples_per_second=statistics.median(rates),
        lowest=min(rates),
        highest=max(rates),
        ratios=_ratios(found, by_contender),
        bytes_per_step=statistics.median(speed.bytes_per_step for speed in speeds),
        bytes_to_ring=_median([speed.bytes_to_ring for speed in speeds]),
        period=_median([speed.period for speed in speeds]),
        wait_p50=p50,
        wait_p95=p95,
        waits_are_counted=counted,
        peak_bytes=statistics.median(speed.peak_bytes for speed in speeds),
    )


def _ratios(found: Sequence[Result], by_contender: dict[str, list[Result]]) -> dict[str, float]:
    mine = _by_seed(found)
    ratios = {}
    for name, others in by_contender.items():
        ratio = median_ratio(mine, _by_seed(others))
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def _by_seed(found: Sequence[Result]) -> dict[int, float]:
    return {result.seed: _speed(result).samples_per_second for result in found}


def _speed(result: Result) -> Speed:
    assert result.speed is not None, "only speeds are summarized"
    return result.speed


def _counted(speeds: Sequence[Speed]) -> tuple[float | None, float | None]:
    return _median([s.wait_p50 for s in speeds]), _median([s.wait_p95 for s in speeds])


def _beyond_limit(
    found: Sequence[Result], limits: Sequence[Result]
) -> tuple[float | None, float | None]:
    usual = _median([_speed(limit).step_p50 for limit in limits])
    if usual is None or found[0].contender == LIMIT:
        return None, None
    p50, p95 = (
        statistics.median(max(0.0, getattr(_speed(result), key) - usual) for result in found)
        for key in ("step_p50", "step_p95")
    )
    return p50, p95


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
