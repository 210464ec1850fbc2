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

[Note: look-ahead pull] The pull α (x - c) also brakes what all workers do alike, so the center goes
only p/(p+1) as far as they would. With a pull a of its own, and a center that moves by b = β of the
way to the mean m, l being its last move::

    x <- x - a (x - T), T = c + λ l ;  when the sum arrives  l <- b (m - c) ;  c <- c + l

the center goes b / (b + a - λab) as far: with a = 0.4, b = 0.9 and λ = 1 it is 0.96, for any p. T
is known to each worker by itself, so overlap stays exact. As η -> 0, alike workers have
z² - (1 - a - b) z - λab = 0, whose roots lie within the unit circle iff λab < a + b and
λab < 2 - a - b; then λab < 1, too. How workers differ from their mean shrinks by 1 - a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule, momentum_of, require_momentum
from lightning_easgd.algorithms.drops import LearningRateDrops
from lightning_easgd.schedules.checks import is_number, require
from lightning_easgd.schedules.companion import Companion, WorkerView


class EASGD(Rule):
    """Synchronous EASGD, and EAMSGD where workers use Nesterov momentum.

        x^i <- x^i - η g^i(x^i) - α (x^i - c) ;   c <- c + Σ_i α (x^i - c)

    Both read the weights before the step. With ``center_momentum`` the center moves by
    v <- μ v + Σ_i α (x^i - c), as under SMA but without restarts.

    With ``pull`` workers are pulled by a, and the strategy's ``beta`` says how far the center goes
    to the mean m of the workers. With ``look_ahead`` they are pulled to where its last move l
    leads::

        x^i <- x^i - η g^i(x^i) - a (x^i - c - λ l) ;   l <- β (m - c) ;   c <- c + l

    Then the center lags less behind the workers, of whose common way the elastic pull takes away
    1/(p+1). It is stable where λaβ < a + β and λaβ < 2 - a - β, for any p.

    Args:
        center_momentum: μ, in [0, 1); 0 is the paper.
        pull: a, in (0, 1]; None: α, as in the paper.
        look_ahead: λ, at least 0; 1 goes as far as the center's last move did.

    Raises:
        ValueError: one is out of range, or not possible with another one; where the strategy is
            made, ``beta`` is not stable with them.
    """

    resets_to_center = False
    average = False
    pull: float | None = None
    look_ahead: float = 0.0

    def __init__(
        self, center_momentum: float = 0.0, *, pull: float | None = None, look_ahead: float = 0.0
    ) -> None:
        self.center_momentum = require_momentum("center_momentum", center_momentum)
        if pull is not None or look_ahead:
            self.pull, self.look_ahead = _require_pull(pull, look_ahead, self.center_momentum)

    @property
    @override
    def moving_rate(self) -> float | None:
        return self.pull

    @property
    @override
    def beta_bound(self) -> float | None:
        return None if self.pull is None else pull_bound(self.pull, self.look_ahead)

    @override
    def pull_(
        self, moved: Tensor, *, center: Tensor, start: Tensor, state: Mapping[str, Any]
    ) -> None:
        assert self.pull is not None
        if "momentum" in state:
            moved.sub_(state["momentum"], alpha=self.look_ahead)
        moved.mul_(self.pull)

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        if self.center_momentum or self.look_ahead:
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


def pull_bound(pull: float, look_ahead: float) -> float:
    """The β at and above which a pull of its own diverges; see [Note: look-ahead pull]."""
    ahead = look_ahead * pull
    swings = (2 - pull) / (1 + ahead)
    return min(swings, pull / (ahead - 1)) if ahead > 1 else swings


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


def _require_pull(
    pull: float | None, look_ahead: float, center_momentum: float
) -> tuple[float, float]:
    if pull is None:
        raise ValueError(
            f"look_ahead={look_ahead!r} is not possible without pull: a worker then loses just what"
            " it sends. Give pull a number in (0, 1], for example 0.4, or leave look_ahead out."
        )
    require("pull", pull, "a number in (0, 1], or None", is_number(pull) and 0 < pull <= 1)
    known = is_number(look_ahead) and look_ahead >= 0
    require("look_ahead", look_ahead, "a number of at least 0, for example 1", known)
    if center_momentum:
        raise ValueError(
            f"pull={pull!r} is not possible with center_momentum={center_momentum!r}: what is"
            " stable is known of each alone. Leave one of them out."
        )
    return float(pull), float(look_ahead)
