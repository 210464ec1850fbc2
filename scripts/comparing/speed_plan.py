"""What is to be measured: jobs, in an order that interleaves the contenders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from comparing.networks import Setting
from comparing.result import Job
from lightning_easgd.schedules.checks import require_count

_AXES = {"network": str, "hosts": int, "stall": float, "slow": float}


def settings_of(setting: Setting, over: str | None, values: Sequence[Any]) -> list[Setting]:
    """One setting, or as many as a sweep has values.

    Args:
        setting: of what is not swept.
        over: the field that is swept; None: none is.
        values: that it takes.

    Raises:
        ValueError: a value is not allowed.
    """
    if over is None:
        return [setting.check()]
    if over not in _AXES:
        raise ValueError(f"sweep.over got {over!r}; allowed are {', '.join(_AXES)}.")
    if not values:
        raise ValueError(f"sweep.values got nothing; name one value of {over} or more.")
    return [replace(setting, **{over: value}).check() for value in values]


def jobs_of(
    settings: Iterable[Setting],
    contenders: Mapping[str, int | None],
    repetitions: int,
    seed: int = 0,
) -> list[Job]:
    """All jobs, one setting after another; contenders take turns within one.

    Args:
        settings: where contenders meet.
        contenders: the period of each.
        repetitions: how many there are, each with a seed of its own.
        seed: the first.

    Raises:
        ValueError: there are no repetitions.
    """
    repetitions = require_count("repetitions", repetitions, "repetitions")
    return [
        Job(name, contenders[name], None, seed + repetition, **asdict(setting))
        for setting in settings
        for repetition in range(repetitions)
        for name in rotated(contenders, repetition)
    ]


def rotated(names: Iterable[str], repetition: int) -> list[str]:
    """The names, each repetition starting with another: the machine's speed drifts."""
    names = list(names)
    first = repetition % len(names)
    return names[first:] + names[:first]
