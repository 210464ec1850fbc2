"""A second, shorter period for some of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lightning_easgd.schedules.checks import require, require_count


@dataclass(frozen=True)
class Often:
    """Which parameters are exchanged more often than every ``tau`` steps, and how often.

    In convolutional networks most parameters (filters, biases, norms) are small, and a few matrices
    have nearly all elements. To exchange what is small every other step costs few bytes, and brings
    workers much closer to each other. Those sums travel by themselves, in full precision, while the
    large one is still in flight.

    Args:
        tau: their period, in optimizer steps; the pause between two exchanges of the others is a
            multiple.
        below: parameters with fewer elements are exchanged often; 0: those in ``names`` only, and
            none if there are no names, as without ``often``.
        names: full names of further parameters, with wildcards as in the shell, for example
            ``("*.norm*",)``.

    Raises:
        ValueError: one is out of range.
    """

    tau: int = 2
    below: int = 100_000
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values, and keep them in the types that are documented."""
        tau = require_count("Often.tau", self.tau, "optimizer steps")
        below = require_count("Often.below", self.below, "elements", least=0)
        names = (self.names,) if isinstance(self.names, str) else self.names
        allowed = "names of parameters or patterns, as in ('*.norm*',)"
        require("Often.names", names, allowed, isinstance(names, Iterable))
        names = tuple(names)
        met = all(isinstance(name, str) and name for name in names)
        require("Often.names", names, allowed, met)
        names = tuple(sorted(names))  # a set has another order in every process
        for field, value in {"tau": tau, "below": below, "names": names}.items():
            object.__setattr__(self, field, value)

    def includes(self, name: str, elements: int) -> bool:
        """Whether a parameter is exchanged often."""
        return elements < self.below or any(fnmatchcase(name, each) for each in self.names)


def require_often(often: object) -> Often | None:
    """What the strategy was given; None if that exchanges nothing often.

    Raises:
        ValueError: it is something else.
    """
    if often is None:
        return None
    require("often", often, "Often(tau=..., below=...), or None", isinstance(often, Often))
    assert isinstance(often, Often)
    return often if often.below or often.names else None


def multiple_of(fragments: int, often: int) -> str:
    """Of what τ is a multiple, in the words of the options that are not 1."""
    parts = {"fragments": fragments, "often.tau": often}
    found = [f"{name}={value}" for name, value in parts.items() if value > 1]
    return " times ".join(found or ["fragments=1"])


def fewer_or_smaller(fragments: int, often: int) -> str:
    """What to do if τ cannot be a multiple."""
    ways = {"fewer fragments": fragments, "a smaller often.tau": often}
    return " or ".join([way for way, value in ways.items() if value > 1] or ["fewer fragments"])
