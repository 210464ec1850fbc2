"""Medians over repetitions, and what they are to each other."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comparing.speed_plan import Setting
from comparing.speed_results import Result
from comparing.statistics import median_ratio

LIMIT = "limit"
"""The contender that never exchanges anything."""


@dataclass(frozen=True)
class Summary:
    """One contender in one setting: medians over its repetitions."""

    network: str
    hosts: int
    stall: float
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
    accuracy: float | None

    @property
    def setting(self) -> Setting:
        """Where."""
        return Setting(self.network, self.hosts, self.stall)


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
    first = found[0]
    rates = [result.samples_per_second for result in found]
    counted = first.wait_p50 is not None
    p50, p95 = _counted(found) if counted else _beyond_limit(found, by_contender.get(LIMIT, []))
    return Summary(
        network=first.network,
        hosts=first.hosts,
        stall=first.stall,
        contender=first.contender,
        repetitions=len(found),
        samples_per_second=statistics.median(rates),
        lowest=min(rates),
        highest=max(rates),
        ratios=_ratios(found, by_contender),
        bytes_per_step=statistics.median(result.bytes_per_step for result in found),
        bytes_to_ring=_median([result.bytes_to_ring for result in found]),
        period=_median([result.period for result in found]),
        wait_p50=p50,
        wait_p95=p95,
        waits_are_counted=counted,
        peak_bytes=statistics.median(result.peak_bytes for result in found),
        accuracy=_median([result.accuracy for result in found]),
    )


def _ratios(found: Sequence[Result], by_contender: dict[str, list[Result]]) -> dict[str, float]:
    mine = {result.repetition: result.samples_per_second for result in found}
    ratios = {}
    for name, others in by_contender.items():
        ratio = median_ratio(mine, {r.repetition: r.samples_per_second for r in others})
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def _counted(found: Sequence[Result]) -> tuple[float | None, float | None]:
    return _median([r.wait_p50 for r in found]), _median([r.wait_p95 for r in found])


def _beyond_limit(
    found: Sequence[Result], limits: Sequence[Result]
) -> tuple[float | None, float | None]:
    usual = _median([limit.step_p50 for limit in limits])
    if usual is None or found[0].contender == LIMIT:
        return None, None
    p50, p95 = (
        statistics.median(max(0.0, getattr(result, key) - usual) for result in found)
        for key in ("step_p50", "step_p95")
    )
    return p50, p95


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
