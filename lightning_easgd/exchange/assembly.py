"""Puts an exchange together from its parts, whatever its sums travel by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lightning_easgd.center.center import Center
from lightning_easgd.communication import AllReduce, Codec, OneWay
from lightning_easgd.communication.progress import Progress
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.center_link import CenterLink
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.difference import Participant
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.gradient_averaging import GradientAverage
from lightning_easgd.exchange.level import GroupLevel, Level
from lightning_easgd.exchange.link import CollectiveLink
from lightning_easgd.exchange.moving_rates import rates_of
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.parts import Parts
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.exchange.rendezvous import Lockstep
from lightning_easgd.exchange.saved_state import SavedState
from lightning_easgd.exchange.solo import Solo
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.tree import Levels
from lightning_easgd.schedules import Period, WorkerView
from lightning_easgd.server.courier import Courier
from lightning_easgd.telemetry import Telemetry


def assemble(
    center: Center,
    all_reduce: AllReduce,
    *,
    optimizers: LocalOptimizers,
    rules: ExchangePolicy,
    telemetry: Telemetry,
    gradients: GradientAverage | None = None,
    often: AllReduce | None = None,
    levels: Sequence[GroupLevel] = (),
    groups: Sequence[Sequence[Sequence[int]]] = (),
) -> Exchange:
    """The exchange of a worker with all others, in lockstep.

    Args:
        center: the center of this worker's module.
        all_reduce: how sums travel between the workers.
        optimizers: the worker's own optimizers.
        rules: period, strength and variants.
        telemetry: where costs are counted.
        gradients: averages those of this worker with others'; None: nothing does.
        often: how sums of parameters that are exchanged often travel; None: there are none.
        levels: of groups with centers of their own, from the outermost inward, whose center takes
            part in exchanges in this worker's place; none: the worker itself does.
        groups: ranks of all groups, level by level, for checkpoints.

    Raises:
        ValueError: the strength is unstable for this number of workers.
    """
    clock, stops = Clock(rules.period, telemetry), Stops()
    view = WorkerView(
        all_reduce.participants, all_reduce.participant, optimizers.largest_learning_rate
    )
    agreement = Agreement(rules.companions(view))
    take_part = partial(
        Participant,
        center,
        optimizers=optimizers,
        rule=rules.algorithm,
        rates=rates_of(rules, all_reduce, optimizers, agreement=agreement, device=center.device),
        from_iterate=rules.elastic_point == "iterate" and not levels,
    )
    link: CollectiveLink
    small: Participant | None = None
    more_often: list[Level] = [*levels]
    if often is not None and rules.often is not None:
        small = take_part(
            often,
            portion=center.often,
            telemetry=Telemetry(),
            settle=lambda: link.wait(),  # which is made below
        )
        more_often.append(Level(small, Period(rules.often.tau)))
    participant = take_part(
        all_reduce,
        telemetry=telemetry,
        may_take_part=lambda: (
            (not levels or levels[0].healthy)
            and (small is None or small.take_difference(0).healthy)
        ),
    )
    link = CollectiveLink(participant, agreement=agreement, stops=stops, schedules=rules.schedules)
    all_levels = Levels(link, more_often, telemetry)
    telemetry.bytes_of_groups = [0 for _ in levels]
    rendezvous = Lockstep(
        all_levels,
        link=link,
        clock=clock,
        center=center,
        stops=stops,
        gradients=gradients,
        overlap=rules.overlap,
    )
    saved = SavedState(center, clock, all_levels, rules, agreement, optimizers, telemetry, groups)
    return Exchange(
        Parts(
            center=center,
            clock=clock,
            levels=all_levels,
            rendezvous=rendezvous,
            policy=rules,
            agreement=agreement,
            stops=stops,
            optimizers=optimizers,
            saved=saved,
            telemetry=telemetry,
            progress=all_reduce.group.progress,
            gradients=gradients,
        )
    )


def assemble_solo(
    center: Center,
    courier: Courier,
    *,
    optimizers: LocalOptimizers,
    rules: ExchangePolicy,
    telemetry: Telemetry,
    progress: Progress,
    timeout: float,
    max_offline_rounds: int,
    codec: Codec | None = None,
    while_waiting: Callable[[], None] = lambda: None,
) -> Exchange:
    """The exchange of a worker with a center behind a server.

    Args:
        center: the center of this worker's module, in one fragment.
        courier: of this worker.
        optimizers: the worker's own optimizers.
        rules: period and rule, as the server has them.
        telemetry: where costs are counted.
        progress: of this worker.
        timeout: as of CenterLink.
        max_offline_rounds: as of CenterLink.
        codec: in whose form differences travel; None: in full precision.
        while_waiting: as of CenterLink.
    """
    clock, stops, agreement = Clock(rules.period, telemetry), Stops(), Agreement(())
    courier.progress = lambda: progress.count
    participant = Participant(
        center,
        OneWay(codec, feedback=rules.algorithm.moving_rate is not None),
        optimizers=optimizers,
        rule=rules.algorithm,
        rates=lambda _: ({}, courier.client.alpha),
        telemetry=telemetry,
        from_iterate=rules.elastic_point == "iterate",
    )
    link = CenterLink(
        participant,
        courier,
        clock=clock,
        stops=stops,
        overlap=rules.overlap,
        timeout=timeout,
        max_offline_rounds=max_offline_rounds,
        while_waiting=while_waiting,
    )
    levels = Levels(link, [], telemetry)
    return Exchange(
        Parts(
            center=center,
            clock=clock,
            levels=levels,
            rendezvous=Solo(link, clock=clock, stops=stops, leads=center.rank == 0),
            policy=rules,
            agreement=agreement,
            stops=stops,
            optimizers=optimizers,
            saved=SavedState(center, clock, levels, rules, agreement, optimizers, telemetry, ()),
            telemetry=telemetry,
            progress=progress,
        )
    )
