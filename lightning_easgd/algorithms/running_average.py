"""A running average of the center over its moves, under any rule.

    polyak      z <- (1 - 1/(t+1)) z + c/(t+1)      all centers so far count alike
    ema         z <- (1 - a) z + a c                the latest count most, some 1/a of them

z_0 = c_0, and t = 1, 2, ... counts the moves of the center. With DOWNPOUR this is ADOWNPOUR and
MVADOWNPOUR. With one worker, τ = 1 and a rule whose workers restart, it is ASGD and MVASGD.
Letters: c the center, z `average`, t `moves`, a `rate`.

On a quadratic of curvature h with gradient noise σ and τ = 1, t times the variance of the first
goes to σ²/(p h²), whatever the strength of the pull and the learning rate: as low as it can be.

Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Zhang, Choromanska,
LeCun 2015, arXiv:1412.6651, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_easgd.schedules.checks import is_number, require, require_choice

Kind = Literal["polyak", "ema"]

DEFAULT_RATE = 0.001
"""a of MVADOWNPOUR and MVASGD in the paper."""


@dataclass(frozen=True)
class CenterAverage:
    """Which running average of the center is evaluated, saved and delivered in its place.

    Args:
        kind: "polyak", the mean of all centers, or "ema", which forgets the early ones.
        rate: a of "ema", in (0, 1]; None: 0.001, which remembers some 1000 moves. So training must
            have several thousand exchanges. Not with "polyak".

    Raises:
        ValueError: the kind is unknown, or the rate out of range.
    """

    kind: Kind
    rate: float | None = None

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, get_args(Kind))
        if self.rate is None:
            return
        if self.kind == "polyak":
            raise ValueError(
                f"rate={self.rate!r} has no meaning for 'polyak', whose rate is 1/(t+1) after t"
                " moves. Leave it out, or set kind='ema'."
            )
        inside = is_number(self.rate) and 0 < self.rate <= 1
        require("rate", self.rate, "a number in (0, 1]", inside)

    def weight(self, moves: int) -> float:
        """By how much the average goes towards the center after its ``moves``-th move."""
        if self.kind == "polyak":
            return 1 / (moves + 1)
        return DEFAULT_RATE if self.rate is None else float(self.rate)

    def follow_(self, average: Sequence[Tensor], center: Sequence[Tensor], moves: int) -> None:
        """Let the average take in the center, in place, after its ``moves``-th move."""
        torch._foreach_lerp_(list(average), list(center), self.weight(moves))


def choose_average(center_average: str | CenterAverage | None) -> CenterAverage | None:
    """The running average that ``center_average`` names or is; None: the center itself.

    Raises:
        ValueError: there is none of this name.
    """
    if center_average is None or isinstance(center_average, CenterAverage):
        return center_average
    for kind in get_args(Kind):
        if center_average == kind:
            return CenterAverage(kind)
    raise ValueError(
        f"center_average={center_average!r} is not allowed. Allowed: None, 'polyak', 'ema', or"
        " lightning_easgd.CenterAverage('ema', rate=...)."
    )
