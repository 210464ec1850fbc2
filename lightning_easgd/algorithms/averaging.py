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
