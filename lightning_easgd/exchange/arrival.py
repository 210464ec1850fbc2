"""What becomes of the center when the sums have arrived."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from lightning_easgd.algorithms import elastic
from lightning_easgd.communication import Header
from lightning_easgd.exchange.consensus import Consensus
from lightning_easgd.exchange.difference import Contribution, Difference, Participant
from lightning_easgd.exchange.states import InFlight
from lightning_easgd.schedules import Schedules


class NonFiniteError(RuntimeError):
    """The weights of every worker became non-finite; the center holds the last finite values."""


class Arrivals:
    """Takes in sums that have arrived.

    Args:
        participant: whose center they move.
        schedules: observe what the workers tell of themselves, after every exchange.
        consensus: what they tell of their distances.
    """

    def __init__(
        self, participant: Participant, *, schedules: Schedules, consensus: Consensus
    ) -> None:
        self.healthy = True
        """Whether a worker had finite weights at the latest exchange that has arrived."""
        self._center = participant.center
        self._all_reduce = participant.all_reduce
        self._rule = participant.rule
        self._telemetry = participant.telemetry
        self._schedules = schedules
        self._consensus = consensus

    def take_in(self, flight: InFlight, headers: Sequence[Header]) -> bool:
        """Move the center by the sums of an exchange.

        Returns:
            Whether what was measured of steps and exchanges holds no longer.

        Raises:
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        healthy = [not header.non_finite for header in headers]
        told = [headers[place] for place in self._all_reduce.senders]
        senders = [not header.non_finite for header in told]
        self._telemetry.non_finite += senders.count(False)
        self._report(flight.clock, healthy)
        if not self.healthy:
            return False
        mean = None
        if self._schedules.read_variance:
            mean = mean_distance(flight.difference, flight.contribution, sum(senders))
        self._move_center(flight, senders)
        if flight.contribution.payload.statistics:
            self._center.statistics.apply(healthy)
        if not (flight.moves and self._schedules.adaptive):
            return False
        # Only now: the center moves as all knew when the exchange began.
        return self._schedules.observe(self._consensus.note(flight.index, told, mean))

    def _report(self, clock: int, healthy: Sequence[bool]) -> None:
        self.healthy = any(healthy)
        ranks, group = self._all_reduce.ranks, self._all_reduce.group
        report_non_finite(
            clock,
            dict(zip(ranks, healthy, strict=True)),
            reports=group.rank == ranks[0],
            all_of_them=len(ranks) == group.size,
        )

    def _move_center(self, flight: InFlight, senders: Sequence[bool]) -> None:
        rule = self._rule.at(flight.clock)
        self._telemetry.rates = {name: getattr(rule, name) for name in self._rule.schedules}
        for fragment in flight.difference.fragments:
            center, total = fragment.center.parts, fragment.total.parts
            if rule.average and not all(senders):
                elastic.scale_(total, [len(senders) / sum(senders)] * len(total))
            if flight.moves:
                for part, move, state in zip(center, total, fragment.rule_state, strict=True):
                    rule.move_(part, move, state)
                fragment.follow_center()
            else:
                elastic.move_center_(center, total)
            if rule.resets_to_center and not (rule.delay or flight.last):
                fragment.reset_to_center(rule.mixing_rate)


def mean_distance(difference: Difference, contribution: Contribution, workers: int) -> float | None:
    """‖m - c‖ of the mean m of ``workers`` workers, when their sums have arrived.

    Parameters with a rate of 0 tell nothing of their mean, and count as if they did not move.
    None if that is all of them, or this worker added nothing.
    """
    norms: list[float] = []
    for fragment, rates in zip(difference.fragments, contribution.rates, strict=False):
        if len(set(rates)) == 1 and rates[0]:
            norms.append(fragment.total.norm() / rates[0])
        elif any(rates):
            views = zip(torch._foreach_norm(fragment.total.views), rates, strict=True)
            norms += [float(norm) / rate for norm, rate in views if rate]
    return math.hypot(*norms) / workers if norms else None


def report_non_finite(
    clock: int, healthy: Mapping[int, bool], *, reports: bool, all_of_them: bool = True
) -> None:
    """Warn of workers whose weights were not finite at an exchange, if this worker does for all.

    Args:
        clock: the step of the exchange.
        healthy: whether they were, by rank.
        reports: whether this worker warns.
        all_of_them: whether ``healthy`` has all workers there are.

    Raises:
        NonFiniteError: no worker had finite weights.
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
