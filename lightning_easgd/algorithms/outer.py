"""Rules that move the center by an optimizer of its own; workers restart at it.

The mean move of the workers since they began at the center, m - c, takes the place of the negative
gradient. Letters: p workers, x^i a worker, c the center, m = (1/p) Σ_i x^i their mean, v the kept
momentum, s `outer_lr`, μ `outer_momentum`, γ the learning rate of the workers.

[Note: stable outer rates] Where workers converge between two exchanges, m stays and c - m becomes
the gradient of a quadratic of curvature 1. There heavy-ball momentum is stable for s < 2 (1 + μ)
and Nesterov's for s < 2 (1 + μ) / (1 + 2μ); workers that do not get as far allow for more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.algorithms.base import Rule, momentum_of, require_momentum
from lightning_easgd.schedules import Constant, ScalarOrSchedule, Tau, as_schedule
from lightning_easgd.schedules.checks import is_number, require_count


class SlowMo(Rule):
    """SlowMo: the center moves with slow momentum.

        v <- μ v + (m - c) ;   c <- c + s v ;   x^i <- c

    The paper keeps u = v / γ, which is the same while γ is constant. If a schedule changes γ, v
    keeps its size here. So the center never depends on the learning rate of one worker.

    Wang, Tantia, Ballas, Rabbat 2020, "SlowMo: improving communication-efficient distributed SGD
    with slow momentum", arXiv:1910.00643.

    Args:
        outer_lr: s, the paper's α, in (0, 2 (1 + μ)); a number, a callable of the optimizer step or
            a schedule.
        outer_momentum: μ, the paper's β, in [0, 1). fairscale takes 0.2 for 4 nodes, 0.5 for 8, 0.6
            for 16.

    Raises:
        ValueError: one is out of its stable range.
    """

    def __init__(self, outer_lr: ScalarOrSchedule = 1.0, outer_momentum: float = 0.5) -> None:
        self.outer_momentum = require_momentum("outer_momentum", outer_momentum)
        self.outer_lr = _require_rate("outer_lr", outer_lr, 2 * (1 + self.outer_momentum))

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        _move_with_momentum_(center, total, state, self.outer_momentum, after=self.outer_lr)


class BMUF(Rule):
    """Blockwise model-update filtering, with classical block momentum.

        v <- μ v + ζ (m - c) ;   c <- c + v ;   x^i <- c

    SlowMo keeps v / s, so both are one rule while ζ = s is constant. If a schedule changes them, a
    new ζ counts for later differences only, and a new s for all that v has gathered.

    Chen, Huo 2016, "Scalable training of deep learning machines by incremental block training with
    intra-block parallel optimization and blockwise model-update filtering", ICASSP.

    Args:
        block_lr: ζ, in (0, 2 (1 + μ)); a number, a callable of the optimizer step or a schedule.
        block_momentum: μ, in [0, 1); the paper's rule of thumb is 1 - 1/p.

    Raises:
        ValueError: one is out of its stable range.
    """

    def __init__(self, block_lr: ScalarOrSchedule = 1.0, block_momentum: float = 0.875) -> None:
        self.block_momentum = require_momentum("block_momentum", block_momentum)
        self.block_lr = _require_rate("block_lr", block_lr, 2 * (1 + self.block_momentum))

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        _move_with_momentum_(center, total, state, self.block_momentum, before=self.block_lr)


class DiLoCo(Rule):
    """DiLoCo: the center moves by any of torch's optimizers, with c - m as its gradient.

        c <- optimizer(c, c - m) ;   x^i <- c

    By default that is Nesterov momentum: v <- μ v + (c - m) ; c <- c - s (c - m + μ v).

    Douillard et al. 2023, "DiLoCo: distributed low-communication training of language models",
    arXiv:2311.08105, with AdamW inside; the defaults are the paper's.

    With a ``delay`` of d steps this is Streaming DiLoCo: the sum travels behind d steps of
    training. What is sent after step t is applied after step t + d on all workers, even if it came
    earlier::

        after t        send x^i - c
        after t + d    c <- optimizer(c, c - m(t)) ;   x^i <- κ x^i + (1 - κ) c

    The next difference counts from the new center. So κ of what a worker did in between is part of
    it, and the rest is given up. A worker that has no step left until then, at the end of ``fit``
    or with fewer batches, applies the sum where it stands.

    Douillard et al. 2025, "Streaming DiLoCo with overlapping communication: towards a distributed
    free lunch", arXiv:2501.18512, Alg. 2, with ``fragments`` for its streams.

    Args:
        outer_lr: s; with Nesterov momentum in (0, 2 (1 + μ) / (1 + 2μ)). A number, a callable of
            the optimizer step or a schedule.
        outer_momentum: μ of Nesterov momentum, in [0, 1); None: 0.9. Not with ``optimizer``.
        delay: d, a whole number of steps from 0 to τ / fragments.
        mixing_rate: κ, the paper's α, in [0, 1); None: 0.5 with a delay, as in the paper, else 0.
        optimizer: a class of ``torch.optim`` that treats every element alike; it sees flat tensors.
        **options: of ``optimizer``.

    Raises:
        ValueError: a rate is out of its stable range, ``optimizer`` can't take flat tensors, or
            delay or mixing_rate is out of range; where the strategy is made, the delay is too long.
    """

    def __init__(
        self,
        outer_lr: ScalarOrSchedule = 0.7,
        outer_momentum: float | None = None,
        *,
        delay: int = 0,
        mixing_rate: float | None = None,
        optimizer: type[Optimizer] | None = None,
        **options: Any,
    ) -> None:
        self.delay = require_count("delay", delay, "steps", least=0, meaning="is without")
        self.mixing_rate = _require_mixing_rate(
            (0.5 if self.delay else 0.0) if mixing_rate is None else mixing_rate
        )
        bound = float("inf")
        if optimizer is None:
            mu = 0.9 if outer_momentum is None else outer_momentum
            mu = require_momentum("outer_momentum", mu)
            optimizer, bound = torch.optim.SGD, 2 * (1 + mu) / (1 + 2 * mu)
            options = {"momentum": mu, "nesterov": mu > 0, **options}
        elif outer_momentum is not None:
            raise ValueError(
                f"outer_momentum={outer_momentum!r} is that of the default optimizer. Give"
                f" {getattr(optimizer, '__name__', optimizer)} options of its own instead."
            )
        self.outer_lr = _require_rate("outer_lr", outer_lr, bound)
        self.optimizer = optimizer
        self.options = options
        self._try()

    @property
    @override
    def kind(self) -> str:
        return f"DiLoCo by {self.optimizer.__name__}"

    @override
    def objection(self, *, tau: Tau, fragments: int, compression: object) -> str | None:
        pause = tau // fragments if is_number(tau) else 0
        if self.delay <= pause:
            return None
        return (
            f"delay={self.delay} with tau={tau!r} and fragments={fragments} is too long: the next"
            " exchange begins tau / fragments steps later, from what this one made of the worker."
            f" Allowed: a number tau of at least {self.delay * fragments}, or delay=0."
        )

    @override
    def move_(self, center: Tensor, total: Tensor, state: dict[str, Any]) -> None:
        parameter = nn.Parameter(center)
        parameter.grad = total.neg_()
        optimizer = self.optimizer([parameter], lr=self.outer_lr, **self.options)  # type: ignore[call-arg]
        optimizer.state[parameter].update(state)
        optimizer.step()
        state.update(optimizer.state[parameter])

    def _try(self) -> None:
        rule = self.at(0)
        try:
            center, total = torch.zeros(2, 2, device="cpu")
            rule.move_(center, total, {})
        except Exception as error:
            raise ValueError(
                f"optimizer={self.optimizer!r} with {self.options} cannot move a flat tensor by its"
                f" gradient ({type(error).__name__}: {error}). Allowed: a class of torch.optim that"
                " treats every element alike and needs no closure, such as SGD, Adam or AdamW, and"
                " its options."
            ) from error


def _move_with_momentum_(
    center: Tensor,
    total: Tensor,
    state: dict[str, Any],
    momentum: float,
    *,
    before: Any = 1.0,
    after: Any = 1.0,
) -> None:
    """Do v <- μ v + ``before`` (m - c) ;  c <- c + ``after`` v, in place."""
    v = momentum_of(state, center)
    v.mul_(momentum).add_(total, alpha=before)
    center.add_(v, alpha=after)


def _require_mixing_rate(mixing_rate: object) -> float:
    if is_number(mixing_rate) and 0 <= mixing_rate < 1:
        return float(mixing_rate)
    raise ValueError(
        f"mixing_rate={mixing_rate!r} never takes a worker to the center. Allowed: a number in"
        " [0, 1)."
    )


def _require_rate(name: str, rate: ScalarOrSchedule, bound: float) -> Any:
    """A number, or a schedule that stays in (0, ``bound``); a number wherever move_ reads it."""

    def check(value: object) -> float:
        if is_number(value) and 0 < value < bound:
            return float(value)
        allowed = "a positive number" if bound == float("inf") else f"a number in (0, {bound:.4g})"
        raise ValueError(
            f"{name}={value!r} is not stable where workers converge between exchanges. Allowed:"
            f" {allowed} at this momentum and optimizer, or a callable of the optimizer step or a"
            " schedule that gives one."
        )

    schedule = as_schedule(name, rate, check)
    return schedule.at(0) if isinstance(schedule, Constant) else schedule
