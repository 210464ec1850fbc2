"""Synchronous EASGD and EAMSGD (Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, eq. 2-6, Alg. 2).

    x^i <- x^i - η g^i(x^i) - α (x^i - c)
    c   <- c + Σ_i α (x^i - c)                  (elastic symmetry: β = pα)

Both lines read the state before the step. Letters: p `workers`, x^i `worker`, c `center`, α
`alpha`, β `beta`, ρ = α/η `rho`, τ `tau`, δ `momentum`, v the velocity.

[Note: exact overlap] Every worker keeps a copy of the center, so its pull α (x^i - c) needs nobody
else. The sum over the workers is first read at the next exchange. It may therefore travel behind
the τ steps in between: the trajectory is that of a blocking exchange, bit for bit.

[Note: residual] A codec that sends few elements lets a value wait some T exchanges. If a
worker were pulled to c all the while, it would lose all of x - c, and then the center would gain it
from every worker at once: alike workers overshoot p-fold, and diverge. Let e be what a worker has
lost and not sent yet. So it is pulled to c + γe, where it expects the center::

    d = α (x - c - γe) ;  x <- x - d ;  e <- e + d ;  every T exchanges  c <- c + Σ_i e^i ; e <- 0

Between two sendings e goes to (x + e - c) / (1 + γ), which x + e - c, being kept, says beforehand:
when all send, what is left of the difference is 1 - (p+1)/(1+γ) of it. With γ = p/2 that lies in
(-1, 1), and for every T alike workers are stable iff they are where nothing is held back, at
α < 2/(p+1) (checked numerically, as that γ <= (p-1)/2 is not). With momentum μ in the center what
is sent goes 1/(1-μ) times as far, so γ = p/(2(1-μ)); then α <= 1/(1+γ) is stable for every T.
A last exchange has nothing to wait for. Workers take e back and send α (x + e - c) as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule, momentum_of, require_momentum
from lightning_easgd.algorithms.drops import LearningRateDrops
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.companion import Companion, WorkerView


class EASGD(Rule):
    """Synchronous EASGD, and EAMSGD where workers use Nesterov momentum.

        x^i <- x^i - η g^i(x^i) - α (x^i - c) ;   c <- c + Σ_i α (x^i - c)

    Both read the weights before the step. With ``center_momentum`` the center moves by
    v <- μ v + Σ_i α (x^i - c), as under SMA but without restarts.

    Args:
        center_momentum: μ, in [0, 1); 0 is the paper.

    Raises:
        ValueError: it is out of its stable range.
    """

    resets_to_center = False
    average = False

    def __init__(self, center_momentum: float = 0.0) -> None:
        self.center_momentum = require_momentum("center_momentum", center_momentum)

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        if self.center_momentum:
            total = momentum_of(state, center).mul_(self.center_momentum).add_(total)
        move_center_([center], [total])


class SMA(EASGD):
    """Synchronous model averaging, as in Crossbow: momentum in the center, and restarts.

        x^i <- x^i - η g^i(x^i) - α (x^i - c)
        v   <- μ v + Σ_i α (x^i - c) ;   c <- c + v

    as under EASGD with ``center_momentum``. When the learning rate falls, averaging begins anew
    from the center: x^i <- c, v <- 0. What remained of x^i - c is given up. Optimizers keep their
    state. A worker says with an exchange that its learning rate has fallen. All workers restart
    with the exchange after that, behind their step and the pull, and wait for its sum. All other
    exchanges overlap exactly.

    Koliousis et al. 2019, "Crossbow: scaling deep learning with small batch sizes on multi-GPU
    servers", arXiv:1901.02244, Alg. 1 and section 3; there α = 1/p, here the strategy's ``beta=1``.

    Args:
        center_momentum: μ, in [0, 1).
        lr_drop: what counts as a fall, in (0, 1). It is one if the highest learning rate of a
            worker's parameters is at most this part of its peak since the last restart. A schedule
            that falls slowly leads to many restarts. With ``rho``, α falls along.

    Raises:
        ValueError: one is out of range.
    """

    def __init__(self, center_momentum: float = 0.9, *, lr_drop: float = 0.5) -> None:
        super().__init__(center_momentum)
        if not (is_number(lr_drop) and 0 < lr_drop < 1):
            raise ValueError(
                f"lr_drop={lr_drop!r} is not a part to which a learning rate falls. Allowed: a"
                " number in (0, 1), for example 0.5; algorithm=EASGD(center_momentum=...) is"
                " without restarts."
            )
        self.lr_drop = float(lr_drop)

    @override
    def companions(self, worker: WorkerView) -> list[Companion]:
        return [LearningRateDrops(self.lr_drop, worker.learning_rate)]


def stability_bound(workers: int, *, waits: float = 1.0) -> float:
    """The α at and above which the synchronous form diverges as η -> 0: 2/(p+1).

    Where the center gets what workers lost only every T-th exchange, 1 - (1-α)^T takes α's place.

    From (2-ηh)(2-pα) > 2α and (2-ηh)+(2-pα) > α, the conditions on a quadratic of curvature h.
    With momentum μ in the center more is stable: α < 2(1+μ)/(p+1+μ).

    Args:
        workers: p.
        waits: T.
    """
    if waits == 1.0:
        return 2.0 / (workers + 1)
    return 1.0 - float(((workers - 1) / (workers + 1)) ** (1.0 / waits))


def residual_weight(workers: int, momentum: float = 0.0) -> float:
    """γ, with which a worker reckons with what it holds back; see [Note: residual]."""
    return workers / (2.0 * (1.0 - momentum))


def difference(worker: Sequence[Tensor], center: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Put x - c into ``out``, computed in its precision; lists of tensors of equal shapes.

    The worker's may have another precision, and lie on another device, than the others.
    """
    if all(x.is_cpu and x.dtype == o.dtype for x, o in zip(worker, out, strict=True)):
        for x, c, o in zip(worker, center, out, strict=True):
            torch.sub(x, c, out=o)  # through memory once; what takes lists cannot write elsewhere
    else:
        torch._foreach_copy_(list(out), list(worker))
        torch._foreach_sub_(list(out), list(center))


def scale_(difference: Sequence[Tensor], alpha: Sequence[float]) -> None:
    """Turn x - c into the elastic difference α (x - c), in place; one α per tensor."""
    torch._foreach_mul_(list(difference), list(alpha))


def move_center_(center: Sequence[Tensor], total: Sequence[Tensor]) -> None:
    """Add the summed elastic differences Σ_i α (x^i - c) of all workers to the center, in place."""
    torch._foreach_add_(list(center), list(total))


def undo_look_ahead_(
    point: Sequence[Tensor], momentum_buffer: Sequence[Tensor], momentum: float, lr: float
) -> None:
    """Turn the look-ahead point that torch's Nesterov SGD stores into the paper's iterate.

    ``torch.optim.SGD(nesterov=True)`` stores y = x + δ v with v = -lr * momentum_buffer, where lr
    is the rate of the step that made the buffer. The paper's elastic difference (Alg. 2) is taken
    at x = y + δ * lr * momentum_buffer. Works in place.
    """
    torch._foreach_add_(list(point), list(momentum_buffer), alpha=momentum * lr)
