"""What is to be measured: jobs, in an order that interleaves the contenders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

_AXES = {"network": str, "hosts": int, "stall": float}


@dataclass(frozen=True)
class Setting:
    """Where contenders meet."""

    network: str
    """A name of :func:`comparing.networks.rate_of`, or "cluster" on a real one."""
    hosts: int
    """Workers, one on each emulated host."""
    stall: float = 0.0
    """Seconds that every worker stalls at random, once in 16 steps on average."""

    def __str__(self) -> str:
        stalls = f", random stalls of {self.stall:g} s" if self.stall else ""
        return f"{self.network}, {self.hosts} hosts{stalls}"

    def check(self) -> Setting:
        """Itself.

        Raises:
            ValueError: it cannot be made.
        """
        if isinstance(self.hosts, bool) or not isinstance(self.hosts, int) or self.hosts < 2:
            raise ValueError(f"hosts got {self.hosts!r}; allowed is a whole number from 2 on.")
        if self.hosts > 200:
            raise ValueError(f"hosts got {self.hosts}; allowed are up to 200 on one machine.")
        if not isinstance(self.stall, (int, float)) or self.stall < 0:
            raise ValueError(f"stall got {self.stall!r}; allowed are seconds from 0 on.")
        return self


@dataclass(frozen=True)
class Job:
    """One contender's turn."""

    setting: Setting
    contender: str
    repetition: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The inverse of :meth:`to_json`."""
        return cls(**(values | {"setting": Setting(**values["setting"])}))


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


def jobs_of(settings: Iterable[Setting], contenders: Iterable[str], repetitions: int) -> list[Job]:
    """All jobs, one setting after another; contenders take turns within one.

    Raises:
        ValueError: there are no repetitions.
    """
    if isinstance(repetitions, bool) or not isinstance(repetitions, int) or repetitions < 1:
        raise ValueError(f"repetitions got {repetitions!r}; allowed is a whole number from 1 on.")
    return [
        Job(setting, name, repetition)
        for setting in settings
        for repetition in range(repetitions)
        for name in rotated(contenders, repetition)
    ]


def rotated(names: Iterable[str], repetition: int) -> list[str]:
    """The names, each repetition starting with another: the machine's speed drifts."""
    names = list(names)
    first = repetition % len(names)
    return names[first:] + names[:first]
