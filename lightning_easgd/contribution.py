"""What one worker brings to an exchange, and what it loses by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lightning_easgd.algorithms import elastic
from lightning_easgd.center import Center
from lightning_easgd.communication import Payload
from lightning_easgd.flat import FlatVector
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.rates import MovingRates
from lightning_easgd.telemetry import Telemetry


class Contribution:
    """The elastic differences of one worker.

    Args:
        center: of this worker's module.
        optimizers: the worker's own.
        rates: the moving rates α.
        telemetry: where exchanges and distances are recorded.
        round_: makes differences, in place, what is sent of them.
        from_iterate: whether x is the paper's iterate where a parameter is its look-ahead point.
    """

    def __init__(
        self,
        center: Center,
        optimizers: LocalOptimizers,
        rates: MovingRates,
        *,
        telemetry: Telemetry,
        round_: Callable[[Sequence[torch.Tensor]], None],
        from_iterate: bool,
    ) -> None:
        self._center = center
        self._optimizers = optimizers
        self._rates = rates
        self._telemetry = telemetry
        self._round_ = round_
        self._from_iterate = from_iterate
        self._distance = 0.0
        self.healthy = True
        """Whether the differences that were taken last are finite."""

    @torch.no_grad()
    def take_differences(self) -> None:
        """Put x - c where the sum will be."""
        segments = self._center.elastic()
        for segment in segments:
            segment.total.read_(segment.parameters)
        if self._from_iterate:
            self._optimizers.undo_look_ahead_(
                {
                    id(parameter): view
                    for segment in segments
                    for parameter, view in zip(segment.parameters, segment.total.views, strict=True)
                }
            )
        for segment in segments:
            elastic.difference_(segment.total.parts, segment.center.parts)
        self._measure()

    @torch.no_grad()
    def give(self, clock: int, *, last: bool = False) -> tuple[list[FlatVector], Payload]:
        """Take part in an exchange with the differences that were taken.

        If they are not finite, the worker starts again from the center, with fresh optimizer state.

        Args:
            clock: the step of the exchange.
            last: whether the differences travel as they are.

        Returns:
            What the worker is owed by :meth:`pull_worker`, and what it adds to the sums.
        """
        pull = self._scale(clock, last) if self.healthy else self._restart_worker()
        payload = Payload(self._totals(), self._center.statistics.contribute(self.healthy))
        if not self.healthy:
            self._center.overwrite_worker()
        self._telemetry.exchanges += 1
        self._telemetry.consensus_distance = self._distance
        return pull, payload

    def nothing(self) -> Payload:
        """Differences of zero, for what is held back to be added to."""
        self.healthy = True
        for total in self._totals():
            total.zero_()
        return Payload(self._totals())

    def pull_worker(self, pull: Sequence[FlatVector]) -> None:
        """Move the worker towards the center: x <- x - α (x - c)."""
        for segment, vector in zip(self._center.segments, pull, strict=False):
            vector.subtract_from(segment.parameters)

    def _measure(self) -> None:
        segments = self._center.elastic()
        distance = math.hypot(*(segment.total.norm() for segment in segments))
        size = math.hypot(*(segment.center.norm() for segment in segments))
        self._distance = distance / max(size, 1e-30)
        self.healthy = math.isfinite(distance) or all(s.total.is_finite() for s in segments)

    def _scale(self, clock: int, last: bool) -> list[FlatVector]:
        """Turn x - c into α (x - c); a copy of it is the worker's own pull."""
        segments = self._center.elastic()
        alphas, default = self._rates.at(clock)
        self._telemetry.alpha = max([*alphas.values(), default])
        for segment in segments:
            rates = [alphas.get(id(parameter), default) for parameter in segment.parameters]
            elastic.scale_(segment.total.views, rates)
        if not last:
            self._round_(self._totals())
        return [segment.total.clone() for segment in segments]

    def _totals(self) -> list[torch.Tensor]:
        return [part for segment in self._center.elastic() for part in segment.total.parts]

    def _restart_worker(self) -> list[FlatVector]:
        """Leave a worker with non-finite weights out of the sum and forget what made it so."""
        for segment in self._center.elastic():
            segment.total.zero_()
            self._optimizers.forget(segment.parameters)
        return []
