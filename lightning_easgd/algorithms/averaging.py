"""Rules without a memory whose workers restart at the center.

Letters: p workers, x^i a worker, c the center, m = (1/p) Σ_i x^i their mean, τ `tau`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule
from lightning_easgd.schedules import is_number


class LocalSGD(Rule):
    """Local SGD, or periodic averaging: every τ steps all go on from the mean of the workers.

        c <- c + (m - c) ;   x^i <- c

    With τ = 1 and SGD without momentum this is gradient averaging.

    Stich 2019, "Local SGD converges fast and communicates little", arXiv:1805.09767.
    """

    @override
    def move_(self, center: Tensor, total: Tensor, memory: dict[str, Any]) -> None:
        center.add_(total)


class PostLocalSGD(LocalSGD):
    """Post-local SGD: gradients are averaged at every step at first, then local SGD.

        t < W:   x^i <- x^i - η (1/p) Σ_j g^j(x^j) ;   after that as LocalSGD

    with any optimizer. Exchanges keep to the multiples of τ, before and after: in the warm-up they
    find all workers alike, and bring only the center up to date.

    Lin, Stich, Patel, Jaggi 2018, "Don't use large mini-batches, use local SGD", arXiv:1808.07217.

    Args:
        warm_up: W, optimizer steps with averaged gradients. The paper warms up until the learning
            rate is first lowered, half of the training or more.

    Raises:
        ValueError: it is not a whole number of at least 0.
    """

    def __init__(self, warm_up: int = 100) -> None:
        if not (is_number(warm_up) and warm_up >= 0 and warm_up == int(warm_up)):
            raise ValueError(
                f"warm_up={warm_up!r} is not allowed. Allowed: a whole number of optimizer steps,"
                " at least 0; 0 is local SGD."
            )
        self.warm_up = int(warm_up)


class Downpour(Rule):
    """DOWNPOUR in its synchronous form: the center goes as far as all workers together.

        c <- c + Σ_i (x^i - c) ;   x^i <- c

    x^i - c is what a worker accumulated in its τ steps. The sum is as large as p times the mean: it
    wants a learning rate p times smaller, and is unstable where τ is large. With ``average`` the
    mean takes its place, which in this form is local SGD.

    Dean et al. 2012, "Large scale distributed deep networks"; as the comparator of Zhang et al.
    2015, arXiv:1412.6651, section 5.

    Args:
        average: whether the mean of the workers' moves is taken instead of the sum.

    Raises:
        ValueError: it is neither True nor False.
    """

    def __init__(self, *, average: bool = False) -> None:
        if not isinstance(average, bool):
            raise ValueError(f"average={average!r} is not allowed. Allowed: True, False.")
        self.average = average

    @override
    def move_(self, center: Tensor, total: Tensor, memory: dict[str, Any]) -> None:
        center.add_(total)
