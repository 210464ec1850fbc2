"""Rules without a memory whose workers restart at the center.

Letters: p workers, x^i a worker, c the center, m = (1/p) Σ_i x^i their mean, τ `tau`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule


class LocalSGD(Rule):
    """Local SGD, or periodic averaging: every τ steps all go on from the mean of the workers.

        c <- c + (m - c) ;   x^i <- c

    With τ = 1 and SGD without momentum this is gradient averaging.

    Stich 2019, "Local SGD converges fast and communicates little", arXiv:1805.09767.
    """

    @override
    def move_(self, center: Tensor, total: Tensor, memory: dict[str, Any]) -> None:
        center.add_(total)


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
