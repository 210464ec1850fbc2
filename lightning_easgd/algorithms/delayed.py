"""Local SGD whose sums travel while workers train on, which keep a part of what only they know.

Letters: p workers, x^i a worker, c the center, s^i where a worker stood after its latest exchange,
u^i = x^i - s^i what it did since, w `own`.

[Note: own part] At the k-th exchange the sum of the one before has arrived, and moves the center.
Each worker goes on from all that has arrived, and a part w of what only it knows yet::

    c <- c + mean(u_{k-1}) ;  u_k = x - s is sent ;  s <- c + w u_k ;  x <- s

In the order of a step (see exchange.py) it loses x - s+ = (1 - w) (x - s) + s - c, which it knows
by itself. So the sum travels behind the steps up to the next exchange, with the same bits as if it
were awaited. Every u counts once and in full, so c - c_0 is the sum of all mean(u): no work is
lost. At the end the sum under way is added, and then the mean of what was done since.

[Note: stable own parts] In a direction in which workers go a part r of their way to the optimum in
a round, s_k = (1 - w r) s_{k-1} - (1 - w) r s_{k-2}, so z² - (1 - w r) z + (1 - w) r = 0. For r in
(0, 1] its roots lie within the unit circle iff w > 0 or r < 1. With w = 0, naive delay, workers
that get there in a round (r = 1) swing around it for ever; with w = 1/2 they come |z| = 0.71 closer
a round, and what is stable, r < 2, is what is so for a worker by itself. w = 1, the delta rule, has
z = 0 and 1 - r. How workers differ from their mean becomes -w r of it in a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule
from lightning_easgd.schedules.checks import is_number


class DelayedSGD(Rule):
    """Local SGD one exchange late, in which workers keep a part of what only they know yet.

        c <- c + mean(u) of the exchange before ;   s^i <- c + w u^i ;   x^i <- s^i

    with u^i = x^i - s^i, what a worker did since it stood at s^i after its latest exchange. So all
    that others did arrives one exchange late, and nothing is lost. Workers never wait, and the
    result is the same as if they did, bit for bit.

    w = 1 is the delta rule of overlapped local SGD (CoCoD-SGD: Shen et al. 2019, "Faster
    distributed deep net training: computation and communication decoupled stochastic gradient
    descent", arXiv:1906.12043). The half is our own.

    Args:
        own: w, in (0, 1].

    Raises:
        ValueError: it is out of range; or, where the strategy is made, τ follows the variance
            across workers.
    """

    resets_to_center = False
    from_own_start = True

    def __init__(self, own: float = 0.5) -> None:
        if not (is_number(own) and 0 < own <= 1):
            raise ValueError(
                f"own={own!r} is not a part of what a worker did that it can keep: with none of it"
                " workers swing around where they go, and with more than all of it they overshoot."
                " Allowed: a number in (0, 1], for example 0.5."
            )
        self.own = float(own)

    @property
    @override
    def elastic(self) -> bool:
        return False

    @property
    @override
    def moving_rate(self) -> float:
        return 1 - self.own

    @override
    def pull_(
        self, moved: Tensor, *, center: Tensor, start: Tensor, state: Mapping[str, Any]
    ) -> None:
        torch.add(start, moved, alpha=1 - self.own, out=moved).sub_(center)

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        center.add_(total)
