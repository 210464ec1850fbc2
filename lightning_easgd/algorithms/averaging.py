"""Rules that add the workers' moves to the center, at which they restart.

Letters: p workers, x^i a worker, c the center, m = (1/p) Σ_i x^i their mean, τ `tau`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule, momentum_of, require_momentum
from lightning_easgd.schedules import Tau
from lightning_easgd.schedules.checks import require_bools, require_count


class LocalSGD(Rule):
    """Local SGD, or periodic averaging: every τ steps all go on from the mean of the workers.

        c <- c + (m - c) ;   x^i <- c

    With τ = 1 and SGD without momentum this is gradient averaging.

    Stich 2019, "Local SGD converges fast and communicates little", arXiv:1805.09767.
    """

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        center.add_(total)


class PostLocalSGD(LocalSGD):
    """Post-local SGD: gradients are averaged at every step at first, then local SGD.

        t < W:   x^i <- x^i - η (1/p) Σ_j g^j(x^j) ;   after that as LocalSGD

    Any optimizer will do. Exchanges are at the multiples of τ, in the warm-up too. There all
    workers are alike, so an exchange only brings the center up to date.

    Lin, Stich, Patel, Jaggi 2018, "Don't use large mini-batches, use local SGD", arXiv:1808.07217.

    Args:
        warm_up: W, optimizer steps with averaged gradients. The paper warms up until the learning
            rate is first lowered, half of the training or more.

    Raises:
        ValueError: it is not a whole number of at least 0.
    """

    def __init__(self, warm_up: int = 100) -> None:
        self.warm_up = require_count(
            "warm_up", warm_up, "optimizer steps", least=0, meaning="is local SGD"
        )


class Downpour(Rule):
    """DOWNPOUR in its synchronous form: the center goes as far as all workers together.

        c <- c + Σ_i (x^i - c) ;   x^i <- c

    x^i - c is what a worker accumulated in its τ steps. The sum is p times the mean. So the
    learning rate must be p times smaller, and a large τ is unstable. With ``average`` the center
    moves by the mean instead, which is local SGD.

    Dean et al. 2012, "Large scale distributed deep networks"; as the comparator of Zhang et al.
    2015, arXiv:1412.6651, section 5.

    Args:
        average: whether the mean of the workers' moves is taken instead of the sum.

    Raises:
        ValueError: it is neither True nor False.
    """

    def __init__(self, *, average: bool = False) -> None:
        require_bools(average=average)
        self.average = average

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        center.add_(total)


class MDownpour(Downpour):
    """MDOWNPOUR: DOWNPOUR with Nesterov's momentum in the center, at τ = 1.

        v <- δ v + Σ_i (x^i - c) ;   c <- c + Σ_i (x^i - c) + δ v ;   x^i <- c

    The center c is the paper's look-ahead point, at which workers take their gradients. After one
    step of SGD without momentum, x^i - c is -η g^i(c). As under torch's Nesterov momentum, the
    look-ahead point is also what is evaluated and delivered. With ``average`` this equals DDP with
    ``torch.optim.SGD(momentum=δ, nesterov=True)``.

    Zhang et al. 2015, arXiv:1412.6651, Alg. 4 and 5: a comparator, there with δ = 0.99.

    Args:
        momentum: δ, in [0, 1).
        average: as of Downpour.

    Raises:
        ValueError: one is out of range; or, where the strategy is made, τ is not 1.
    """

    default_tau = 1

    def __init__(self, momentum: float = 0.9, *, average: bool = False) -> None:
        super().__init__(average=average)
        self.momentum = require_momentum("momentum", momentum)

    @override
    def objection(self, *, tau: Tau, fragments: int, compression: object) -> str | None:
        if tau == 1:
            return None
        return (
            f"tau={tau!r} is not possible with {self}: only a worker's first step is taken at the"
            " center's look-ahead point. Allowed: tau=1. For a larger period set"
            " algorithm='downpour', or 'slowmo' or 'diloco' for one with momentum."
        )

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        v = momentum_of(state, center).mul_(self.momentum).add_(total)
        center.add_(total).add_(v, alpha=self.momentum)
