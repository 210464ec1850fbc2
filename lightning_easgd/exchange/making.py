"""Puts a link together, of workers on top as of members in a group."""

from __future__ import annotations

from collections.abc import Callable

from lightning_easgd.algorithms import Rule
from lightning_easgd.center.center import Center
from lightning_easgd.communication import AllReduce
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.difference import Participant
from lightning_easgd.exchange.link import CollectiveLink
from lightning_easgd.exchange.moving_rates import RateFunction
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.schedules import Schedules
from lightning_easgd.telemetry import Telemetry


def make_link(
    center: Center,
    all_reduce: AllReduce,
    *,
    optimizers: LocalOptimizers,
    rule: Rule,
    rates: RateFunction,
    telemetry: Telemetry,
    from_iterate: bool,
    may_take_part: Callable[[], bool],
    agreement: Agreement | None = None,
    stops: Stops | None = None,
    schedules: Schedules | None = None,
) -> CollectiveLink:
    """The link of a worker, or of what takes part in its place, to a center.

    Args:
        center: of all who take part.
        all_reduce: how sums travel between them.
        optimizers: the worker's own.
        rule: how sums move the center, and what becomes of the worker.
        rates: with which multiple it takes part.
        telemetry: where costs are counted.
        from_iterate: as of Participant, like the following.
        may_take_part: whether what takes part in the worker's place, if anything does, can.
        agreement: as of CollectiveLink, like the following; None: nothing.
        stops: None: nobody stops.
        schedules: None: none observes.
    """
    participant = Participant(
        center,
        all_reduce,
        optimizers=optimizers,
        rule=rule,
        rates=rates,
        telemetry=telemetry,
        may_take_part=may_take_part,
        from_iterate=from_iterate,
    )
    return CollectiveLink(
        center,
        all_reduce,
        participant,
        rule=rule,
        telemetry=telemetry,
        agreement=agreement or Agreement(()),
        stops=stops or Stops(),
        schedules=schedules or Schedules({}),
    )
