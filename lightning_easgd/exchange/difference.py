"""What one worker brings to an exchange, and what it loses by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_easgd.algorithms import Rule, elastic
from lightning_easgd.center.center import Center
from lightning_easgd.center.flat import FlatVector
from lightning_easgd.center.fragments import Fragment
from lightning_easgd.center.portion import Portion
from lightning_easgd.center.slices import ParameterSlice
from lightning_easgd.center.starts import stand_at_center
from lightning_easgd.communication import AllReduce, Payload
from lightning_easgd.exchange.moving_rates import RateFunction
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.telemetry import Telemetry

Pull = Sequence[tuple[Fragment, FlatVector]]
"""What a worker loses of each fragment: α (x - c), or what its rule says."""


@dataclass(frozen=True)
class Difference:
    """x - c of some fragments, or x - s, in the memory where their sums will be."""

    fragments: list[Fragment]
    distance: float = 0.0
    """‖x - c‖."""
    size: float = 0.0
    """‖c‖."""
    healthy: bool = True
    """Whether it is finite, and those of this worker's group are if there are groups."""

    @property
    def totals(self) -> dict[str, Tensor]:
        """Its flat tensors, by names that are the same in every exchange."""
        return {
            f"{fragment.name}, {part.dtype}": part
            for fragment in self.fragments
            for part in fragment.total.parts
        }

    def points(self) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """Its values, parameter by parameter."""
        for fragment in self.fragments:
            yield from fragment.values(fragment.total)

    def zero_(self) -> None:
        """Bring nothing."""
        for fragment in self.fragments:
            fragment.total.zero_()


@dataclass(frozen=True)
class Contribution:
    """What a worker adds to the sums."""

    payload: Payload
    pull: Pull = field(default_factory=list)
    """What the worker is owed by :func:`pull_worker`."""
    rates: list[list[float]] = field(default_factory=list)
    """The multiple of each piece of each fragment; empty if it adds nothing."""


class Participant:
    """Takes part in exchanges with the weights of one worker, or of the center of its group.

    Args:
        center: of this worker's module.
        all_reduce: how sums travel between the workers.
        portion: what is exchanged of the center; None: its main one, with its statistics.
        optimizers: the worker's own.
        rule: what becomes of the worker.
        rates: with which multiple it takes part.
        telemetry: where exchanges and distances are recorded.
        may_take_part: asked at each exchange; False while something else of the worker, or the
            center of its group, is not finite.
        from_iterate: whether x is the paper's iterate where a parameter is its look-ahead point.
        settle: waits for what else moves the center, before the worker starts again from there.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        *,
        portion: Portion | None = None,
        optimizers: LocalOptimizers,
        rule: Rule,
        rates: RateFunction,
        telemetry: Telemetry,
        may_take_part: Callable[[], bool] = lambda: True,
        from_iterate: bool,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.center = center
        self.portion = portion or center.main
        self.all_reduce = all_reduce
        self._optimizers = optimizers
        self.rule = rule
        self._rates_at = rates
        self.telemetry = telemetry
        self._may_take_part = may_take_part
        self._gamma = elastic.residual_weight(len(all_reduce.participants), rule.center_momentum)
        self._from_iterate = from_iterate
        self._settle = settle

    @torch.no_grad()
    def take_difference(self, index: int) -> Difference:
        """Put x - c, or x - s, of the fragments of this index where their sums will be."""
        fragments, rule = self.portion.open(index), self.rule
        from_start = rule.from_own_start or (rule.resets_to_center and not rule.mixing_rate)
        for fragment in fragments:
            fragment.take_difference(from_start=from_start)
        if self._from_iterate:
            points = Difference(fragments).points
            self._optimizers.undo_look_ahead_(points())
            for twin in self.center.ties.points(points()):
                self._optimizers.undo_look_ahead_([twin])
        return self._measured(fragments)

    @torch.no_grad()
    def contribute(
        self, difference: Difference, *, clock: int, index: int, last: bool = False
    ) -> Contribution:
        """Take part in an exchange: turn a difference into what is sent of it.

        If it is not finite, the worker starts again from the center, with fresh optimizer state.

        Args:
            difference: of this worker.
            clock: the step of the exchange.
            index: of the fragments; statistics travel with the first.
            last: whether the difference travels as it is, and the worker stays as it is.
        """
        rates: list[list[float]] = []
        pull: Pull = []
        if difference.healthy:
            # After the last exchange no worker goes on.
            pulls = not (self.rule.resets_to_center or last)
            if pulls and self.rule.moving_rate is not None:
                rule = self.rule.at(clock)
                pull = [(f, f.lost_by(rule)) for f in difference.fragments]
            rates = self._scale(difference, clock, last)
            if pulls and self.rule.moving_rate is None:
                pull = [(f, f.copy_of_total()) for f in difference.fragments]
        else:
            difference.zero_()
        statistics = self.center.statistics
        contributed: list[Tensor] = []
        if self.portion is self.center.main and index == 0:
            contributed = statistics.contribute(difference.healthy, last=last)
        if not difference.healthy and not last:
            self._settle()
            self._optimizers.forget(self.center.parameters())
            self.center.overwrite_worker()
            if self.rule.from_own_start:
                stand_at_center(self.center)  # before sums under way move it
        self.telemetry.exchanges += 1
        self.telemetry.consensus_distance = difference.distance / max(difference.size, 1e-30)
        return Contribution(Payload(difference.totals, contributed), pull, rates)

    def nothing(self, index: int) -> Difference:
        """A difference of zero, for residuals to be added to."""
        difference = Difference(self.portion.open(index))
        difference.zero_()
        return difference

    def learning_rate(self) -> float:
        """The largest η of this worker; 0 if its optimizers have none."""
        return self._optimizers.largest_learning_rate()

    def _measured(self, fragments: list[Fragment]) -> Difference:
        distance = math.hypot(*(fragment.distance() for fragment in fragments))
        size = math.hypot(*(fragment.center.norm() for fragment in fragments))
        finite = math.isfinite(distance) or all(f.total.is_finite() for f in fragments)
        healthy = self.all_reduce.agree(
            finite and self._may_take_part(),
            lambda: sum(fragment.total.checksum() for fragment in fragments) % 2**63,
        )
        return Difference(fragments, distance, size, healthy)

    def _scale(self, difference: Difference, clock: int, last: bool) -> list[list[float]]:
        """Turn x - c into what is sent of it; with which multiples."""
        if not self.rule.resets_to_center:
            self.all_reduce.add_residual_(difference.totals, 1.0 if last else -self._gamma)
        alphas, default = self._rates_at(clock)
        alphas = self.center.ties.strongest(alphas)
        self.telemetry.alpha = max([*alphas.values(), default])
        found = [
            [alphas.get(id(slice_.whole), default) for slice_ in fragment.slices]
            if alphas
            else [default] * len(fragment.slices)
            for fragment in difference.fragments
        ]
        for fragment, rates in zip(difference.fragments, found, strict=True):
            if len(set(rates)) == 1:
                elastic.scale_(fragment.total.parts, rates[:1] * len(fragment.total.parts))
            else:
                elastic.scale_(fragment.total.views, rates)
        if not last:
            self.all_reduce.quantize_(difference.totals.values())
        if self.rule.moving_rate is not None:
            self.telemetry.alpha = self.rule.moving_rate
        return found


def pull_worker(pull: Pull) -> None:
    """Take from the worker what it loses: x <- x - α (x - c), or what its rule says."""
    for fragment, vector in pull:
        fragment.pull(vector)
