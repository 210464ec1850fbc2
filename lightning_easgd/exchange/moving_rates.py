"""The moving rate α of every parameter: from strength, learning rates and number of workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_easgd.algorithms import elastic
from lightning_easgd.communication import AllReduce
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.schedules import Strength

RateFunction = Callable[[int], tuple[dict[int, float], float]]
"""The multiples of x - c that a worker adds at a step, as of MovingRates.at."""

_HELD_BELOW_EDGE = 0.99
NOT_AT_ONCE = 1.01
"""A value that takes more exchanges than this is said to wait."""
_DEFAULT = ", or leave beta, alpha and rho unset (beta=0.9)"


@dataclass(frozen=True)
class Bound:
    """Where α is stable."""

    value: float
    """α must be below it."""
    why: str = "2/(workers + 1)"
    """As a formula."""
    where: str = ""
    """Why it is not that of full precision, as a clause."""
    else_: str = ""
    """What to do instead of taking a smaller α, as a clause; empty: the usual."""


def stable_below(workers: int, *, momentum: float, waits: tuple[float, float]) -> Bound:
    """Where α is stable; see algorithms/elastic.py, [Note: residual].

    Args:
        workers: p.
        momentum: μ of the center.
        waits: how many exchanges a value takes until its worker has sent it, and until the owner of
            its sum has added it.
    """
    to_send, to_add = waits
    bound = Bound(elastic.stability_bound(workers))
    if to_add > NOT_AT_ONCE:
        bound = Bound(
            elastic.stability_bound(workers, waits=to_add),
            f"1 - ((workers - 1)/(workers + 1))^(1/{to_add:.3g})",
            f", since with this codec the center gets a value only every {to_add:.3g} exchanges",
            ", or take a codec that loses less or has block=None",
        )
    if momentum and to_send > NOT_AT_ONCE:
        value = 1 / (1 + elastic.residual_weight(workers, momentum))
        if value < bound.value:
            bound = Bound(
                value,
                "1/(1 + workers/(2 (1 - center_momentum)))",
                f", since the codec holds much back and center_momentum={momentum:g}",
                ", or take center_momentum=0, or compression='int8', 'bf16', 'fp16' or None",
            )
    return bound


class MovingRates:
    """Resolves β, α or ρ to α, and keeps it where the synchronous form is stable.

    Args:
        strength: the one of β, α and ρ that is set.
        optimizers: the worker's own, for the learning rates η in α = ηρ.
        workers: the number of workers, p.
        reports: whether this worker warns for all.
        bound: where α is stable; None: as without a codec.

    Raises:
        ValueError: α is unstable for this number of workers at the start of training.
    """

    def __init__(
        self,
        strength: Strength,
        optimizers: LocalOptimizers,
        *,
        workers: int,
        reports: bool,
        bound: Bound | None = None,
    ) -> None:
        self._strength = strength
        self._optimizers = optimizers
        self._workers = workers
        self._why = bound or Bound(elastic.stability_bound(workers))
        self._bound = self._why.value
        self._reports = reports
        self._limits = {"alpha": self._bound, "beta": self._bound * workers}
        if strength.kind in self._limits:
            strength.schedule.limit(_HELD_BELOW_EDGE * self._limits[strength.kind])
        self._require_stability()

    def at(self, step: int) -> tuple[dict[int, float], float]:
        """α by parameter identity, and α of the parameters that are not among them.

        An α that a callable or a learning rate carries to the edge of stability, or past it, is
        held just below. A warning says so once.
        """
        value = self._strength.at(step)
        if self._strength.kind != "rho":
            return {}, self._hold(self._strength.alpha(value, 0.0, self._workers), step)
        rates = self._optimizers.learning_rates()
        alphas = {
            lr: self._hold(self._strength.alpha(value, lr, self._workers), step)
            for lr in dict.fromkeys(rates.values())
        }
        return {key: alphas[lr] for key, lr in rates.items()}, 0.0

    def _hold(self, alpha: float, step: int) -> float:
        if alpha < self._bound:
            return alpha
        held = _HELD_BELOW_EDGE * self._bound
        if self._reports:
            warnings.warn(
                f"At step {step} the moving rate alpha reached {alpha:.4g}, but {self._workers}"
                f" workers are stable only below {self._why.why} = {self._bound:.4g}. It is held at"
                f" {held:.4g} wherever the schedule exceeds that.",
                stacklevel=2,
            )
        self._reports = False
        return held

    def _require_stability(self) -> None:
        kind, schedule = self._strength.kind, self._strength.schedule
        # ρ may rise while η falls: how α = ηρ goes on is not known yet.
        value = schedule.at(0) if kind == "rho" else schedule.bounds[1]
        lr = self._optimizers.largest_learning_rate()
        alpha = self._strength.alpha(value, lr, self._workers)
        if alpha < self._bound:
            return
        limits = {**self._limits, "rho": self._bound / max(lr, 1e-30)}
        at_rate = f" at learning rate {lr:g}" if kind == "rho" else ""
        raise ValueError(
            f"{kind}={value:g} gives a moving rate alpha={alpha:g}{at_rate} for {self._workers}"
            f" worker(s), which diverges: synchronous EASGD needs alpha < {self._why.why} ="
            f" {self._bound:.4g}{self._why.where}. Set {kind} below {limits[kind]:.4g}"
            f"{self._why.else_ or _DEFAULT}."
        )


def rates_of(
    policy: ExchangePolicy,
    all_reduce: AllReduce,
    optimizers: LocalOptimizers,
    *,
    agreement: Agreement,
    device: torch.device,
) -> RateFunction:
    """With which multiples of x - c this worker takes part in the exchanges of all.

    Args:
        policy: the strength, and the rule that may need none.
        all_reduce: how sums travel between the workers.
        optimizers: the worker's own.
        agreement: its companions may set another multiple.
        device: of the center.

    Raises:
        ValueError: the strength is unstable for this number of workers.
    """
    rule, workers = policy.algorithm, len(all_reduce.participants)
    if not rule.elastic:
        return lambda step: ({}, agreement.share(rule.share(workers)))
    if rule.beta_bound is None:
        waits = all_reduce.waits(device)
        bound = stable_below(workers, momentum=rule.center_momentum, waits=waits)
    else:
        bound = Bound(rule.beta_bound / workers, f"{rule.beta_bound:.4g}/workers with {rule}")
    reports = all_reduce.group.rank == 0
    return MovingRates(
        policy.strength, optimizers, workers=workers, reports=reports, bound=bound
    ).at
