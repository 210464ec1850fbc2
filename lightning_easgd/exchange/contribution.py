"""What one worker brings to an exchange, and what it loses by it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_easgd.algorithms import Rule, elastic
from lightning_easgd.center.center import Center
from lightning_easgd.center.flat import FlatVector
from lightning_easgd.center.fragments import Fragment, ParameterSlice
from lightning_easgd.communication import AllReduce, Payload
from lightning_easgd.exchange.moving_rates import RateFunction
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.telemetry import Telemetry

Pull = list[tuple[Fragment, FlatVector]]
"""What a worker loses: α (x - c) of each fragment."""


class NonFiniteError(RuntimeError):
    """The weights of every worker became non-finite; the center holds the last finite values."""


class Contribution:
    """The differences of one worker.

    Args:
        center: of this worker's module.
        all_reduce: how sums travel between the workers.
        optimizers: the worker's own.
        rule: what becomes of the worker.
        rates: with which multiple it takes part.
        telemetry: where exchanges and distances are recorded.
        may_take_part: whether what takes part in the worker's place, if anything does, can.
        from_iterate: whether x is the paper's iterate where a parameter is its look-ahead point.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        *,
        optimizers: LocalOptimizers,
        rule: Rule,
        rates: RateFunction,
        telemetry: Telemetry,
        may_take_part: Callable[[], bool],
        from_iterate: bool,
    ) -> None:
        self._center = center
        self._all_reduce = all_reduce
        self._optimizers = optimizers
        self._rule = rule
        self._rates_at = rates
        self._telemetry = telemetry
        self._may_take_part = may_take_part
        self._gamma = elastic.residual_weight(len(all_reduce.participants), rule.center_momentum)
        self._from_iterate = from_iterate
        self._rates: list[list[float]] = []
        self.distance = 0.0
        """‖x - c‖ of the fragments whose differences were taken last."""
        self.size = 0.0
        """‖c‖ of the same."""
        self.fragments: list[Fragment] = []
        """Those of which the differences were taken last."""
        self.healthy = True
        """Whether these differences, and those of its group if there are groups, are finite."""

    @torch.no_grad()
    def take_differences(self, turn: int) -> None:
        """Put x - c of the fragments whose turn it is where their sums will be."""
        self.fragments = self._center.open(turn)
        for fragment in self.fragments:
            fragment.take_difference(from_start=self._rule.restarts and not self._rule.mixing)
        if self._from_iterate:
            self._optimizers.undo_look_ahead_(self._points())
            for twin in self._center.ties.points(self._points()):
                self._optimizers.undo_look_ahead_([twin])
        self._measure()

    @torch.no_grad()
    def give(self, clock: int, turn: int, *, last: bool = False) -> tuple[Pull, Payload]:
        """Take part in an exchange with the differences that were taken.

        If they are not finite, the worker starts again from the center, with fresh optimizer state.

        Args:
            clock: the step of the exchange.
            turn: statistics travel with the first.
            last: whether the differences travel as they are, and the worker stays as it is.

        Returns:
            What the worker is owed by :func:`pull_worker`, and what it adds to the sums.
        """
        pull = self._scale(clock, last) if self.healthy else self._leave_out()
        statistics = self._center.statistics
        contributed = statistics.contribute(self.healthy, last=last) if turn == 0 else []
        payload = Payload(self._totals(), contributed)
        if not self.healthy and not last:
            self._optimizers.forget(self._center.parameters())
            self._center.overwrite_worker()
        self._telemetry.exchanges += 1
        self._telemetry.consensus_distance = self.distance / max(self.size, 1e-30)
        return pull, payload

    def mean_distance(self, workers: int) -> float | None:
        """‖m - c‖ of the mean m of ``workers`` workers, when their sums have arrived.

        Parameters with a rate of 0 tell nothing of their mean, and count as if they did not move.
        None if that is all of them, or this worker added nothing.
        """
        norms: list[float] = []
        for fragment, rates in zip(self.fragments, self._rates, strict=bool(self._rates)):
            if len(set(rates)) == 1 and rates[0]:
                norms.append(fragment.total.norm() / rates[0])
            elif any(rates):
                views = zip(torch._foreach_norm(fragment.total.views), rates, strict=True)
                norms += [float(norm) / rate for norm, rate in views if rate]
        return math.hypot(*norms) / workers if norms else None

    def learning_rate(self) -> float:
        """The largest η of this worker; 0 if its optimizers have none."""
        return self._optimizers.largest_learning_rate()

    def nothing(self, turn: int) -> Payload:
        """Differences of zero, for what is held back to be added to."""
        self.fragments = self._center.open(turn)
        self.healthy = True
        self._leave_out()
        return Payload(self._totals())

    def _points(self) -> Iterator[tuple[ParameterSlice, Tensor]]:
        for fragment in self.fragments:
            yield from fragment.values(fragment.total)

    def _measure(self) -> None:
        self.distance = math.hypot(*(fragment.total.norm() for fragment in self.fragments))
        self.size = math.hypot(*(fragment.center.norm() for fragment in self.fragments))
        finite = math.isfinite(self.distance)
        finite = finite or all(f.total.is_finite() for f in self.fragments)
        healthy = finite and self._may_take_part()
        self.healthy = self._all_reduce.agree(healthy, self._checksum)

    def _checksum(self) -> int:
        return sum(fragment.total.checksum() for fragment in self.fragments) % 2**63

    def _scale(self, clock: int, last: bool) -> Pull:
        """Turn x - c into what is sent of it; a copy of α (x - c) is the worker's own pull."""
        if not self._rule.restarts:
            self._all_reduce.reckon_(self._totals(), 1.0 if last else -self._gamma)
        alphas, default = self._rates_at(clock)
        alphas = self._center.ties.strongest(alphas)
        self._telemetry.alpha = max([*alphas.values(), default])
        self._rates = [
            [alphas.get(id(piece.whole), default) for piece in fragment.pieces]
            if alphas
            else [default] * len(fragment.pieces)
            for fragment in self.fragments
        ]
        for fragment, rates in zip(self.fragments, self._rates, strict=True):
            if len(set(rates)) == 1:
                elastic.scale_(fragment.total.parts, rates[:1] * len(fragment.total.parts))
            else:
                elastic.scale_(fragment.total.views, rates)
        if not last:
            self._all_reduce.quantize_(self._totals().values())
        if self._rule.restarts:
            self._telemetry.alpha = 1 - self._rule.mixing
        if self._rule.restarts or last:  # after the last exchange no worker goes on
            return []
        return [(fragment, fragment.copy_of_total()) for fragment in self.fragments]

    def _leave_out(self) -> Pull:
        """Add nothing to the sums, and pull nothing."""
        self._rates = []
        for fragment in self.fragments:
            fragment.total.zero_()
        return []

    def _totals(self) -> dict[str, Tensor]:
        return {
            f"{fragment.name}, {part.dtype}": part
            for fragment in self.fragments
            for part in fragment.total.parts
        }


def pull_worker(pull: Pull) -> None:
    """Move the worker towards the center: x <- x - α (x - c)."""
    for fragment, vector in pull:
        fragment.pull(vector)


def report_non_finite(
    clock: int, healthy: Mapping[int, bool], *, reports: bool, all_of_them: bool = True
) -> None:
    """Warn of workers whose weights were not finite at an exchange, if this worker does for all.

    Args:
        clock: the step of the exchange.
        healthy: whether they were, by rank.
        reports: whether this worker warns.
        all_of_them: whether there are no other workers.

    Raises:
        NonFiniteError: those of no worker at all were.
    """
    sick = [rank for rank, well in healthy.items() if not well]
    if all_of_them and len(sick) == len(healthy):
        raise NonFiniteError(
            f"At step {clock} the weights of every worker were NaN or infinite. Training stops;"
            " the center holds the last finite weights. Lower the learning rate, clip gradients"
            " or check the data."
        )
    if sick and reports:
        warnings.warn(
            f"At step {clock} the weights of worker(s) {sick} were NaN or infinite. Their"
            " differences were left out of the exchange, and they restarted from the center"
            " with fresh optimizer state.",
            stacklevel=2,
        )
