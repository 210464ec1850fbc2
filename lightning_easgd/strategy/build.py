"""From the options of the strategy to the center and the exchange that a fit has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl

from lightning_easgd.center.center import Center
from lightning_easgd.center.portion import Portion
from lightning_easgd.communication import Subgroup, WorkerGroup, make_all_reduce
from lightning_easgd.exchange.assembly import assemble, assemble_solo
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.gradient_averaging import GradientAverage
from lightning_easgd.exchange.level import GroupLevel
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.strategy.at_server import AtServer
from lightning_easgd.strategy.options import Options
from lightning_easgd.strategy.replica import replica_of
from lightning_easgd.strategy.unsupported import refuse_own_losses
from lightning_easgd.telemetry import Telemetry

_WORTH_ITS_START = 2**17
"""Bytes of a bucket below which its start costs more than others gain by not waiting for it."""


def make_center(module: pl.LightningModule, options: Options, rank: int) -> Center:
    """The center of a worker's module, which is equal on all workers, and those of its groups.

    Raises:
        ValueError: the module has no parameter to train, or cannot be cut into so many fragments.
    """
    group: Center | None = None
    for _ in options.tied.levels if options.tied else []:
        group = Center(module, buffers="local", rank=rank, group=group)
    return Center(
        module,
        buffers=options.buffers,
        rank=rank,
        fragment_count=options.rules.period.fragments,
        often=options.often,
        offload=options.offload,
        averaging=options.averaging,
        group=group,
    )


def make_exchange(
    center: Center,
    group: WorkerGroup,
    options: Options,
    *,
    groups: Sequence[Sequence[Sequence[int]]],
    trainer: pl.Trainer,
    telemetry: Telemetry,
    server: AtServer | None = None,
    while_waiting: Callable[[], None] = lambda: None,
) -> Exchange:
    """The exchange of this worker with the others; all of them must call it.

    Args:
        center: of this worker's module.
        group: all workers.
        options: equal on all of them.
        groups: the ranks of every group, level by level from the outermost inward; none if every
            worker takes part by itself.
        trainer: with the optimizers.
        telemetry: where costs are counted.
        server: that has the center; None: all workers have it.
        while_waiting: as of CenterLink.

    Raises:
        ValueError: the strength is unstable for this number of workers, or an optimizer cannot be
            used where gradients are averaged.
        ExchangeError: a worker left or did not come in time.
    """
    rules = options.rules
    optimizers = LocalOptimizers(lambda: trainer.strategy.optimizers)
    if server is not None:
        telemetry.ddp_bytes_per_step = _ring_bytes(center, trainer.world_size)
        return assemble_solo(
            center,
            server.courier,
            optimizers=optimizers,
            rules=rules,
            telemetry=telemetry,
            progress=group.progress,
            timeout=server.seconds,
            max_offline_rounds=server.at.max_offline_rounds,
            codec=options.codec,
            while_waiting=while_waiting,
        )
    subgroups = [Subgroup(group, ranks, options.bucket_bytes) for ranks in groups]
    levels: list[GroupLevel] = []
    gradients = None
    if options.tied is not None:
        levels = _make_levels(center, group, options, subgroups, optimizers)
    elif subgroups or rules.algorithm.warm_up:
        everybody = [list(range(group.size))]
        refuse_own_losses(trainer.strategy.optimizers)
        gradients = GradientAverage(
            subgroups[0] if subgroups else Subgroup(group, everybody, options.bucket_bytes),
            list(trainer.lightning_module.parameters()),
            replica=replica_of(trainer, center, optimizers),
            telemetry=telemetry,
            until=rules.algorithm.warm_up or None,
            inside=bool(subgroups),
        )
    all_reduce = make_all_reduce(
        group,
        options.bucket_bytes if center.often is None else _bucket_beside(center.often, options),
        options.codec,
        feedback=rules.algorithm.moving_rate is not None,
        subgroup=subgroups[0] if subgroups else None,
        agrees=not levels,
    )
    often = None
    if center.often is not None:
        often = make_all_reduce(group, options.bucket_bytes, None, feedback=False)
    trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
    telemetry.ddp_bytes_per_step = all_reduce.ring_bytes(trained)
    return assemble(
        center,
        all_reduce,
        optimizers=optimizers,
        rules=rules,
        telemetry=telemetry,
        gradients=gradients,
        often=often,
        levels=levels,
        groups=groups,
    )


def _ring_bytes(center: Center, workers: int) -> int:
    """What DDP would send; as with very many workers where only a server knows how many."""
    trained = sum(parameter.nbytes for parameter in center.parameters())
    return 2 * trained * (workers - 1) // workers if workers > 1 else 2 * trained


def _bucket_beside(often: Portion, options: Options) -> int:
    """The most that one all-reduce of the large parameters carries while small ones come and go.

    What begins meanwhile waits until the buckets that left before are through the network. So these
    are no larger than what is exchanged often, but worth their start.
    """
    return min(options.bucket_bytes, max(_WORTH_ITS_START, often.nbytes))


def _make_levels(
    center: Center,
    group: WorkerGroup,
    options: Options,
    subgroups: Sequence[Subgroup],
    optimizers: LocalOptimizers,
) -> list[GroupLevel]:
    """Those of groups with centers of their own, from the outermost inward."""
    assert options.tied is not None
    levels: list[GroupLevel] = []
    for depth in reversed(range(len(subgroups))):
        inside = subgroups[depth + 1] if levels else None
        all_reduce = make_all_reduce(
            group,
            options.bucket_bytes,
            None,
            feedback=False,
            subgroup=inside,
            within=subgroups[depth],
            agrees=False,
        )
        level = GroupLevel(
            _center_of(center, depth),
            all_reduce,
            options.tied.levels[depth],
            sizes=_sizes(subgroups[depth], inside),
            inside=levels[0] if levels else None,
            optimizers=optimizers,
            from_iterate=options.rules.elastic_point == "iterate",
        )
        levels.insert(0, level)
    return levels


def _center_of(center: Center, depth: int) -> Center:
    """That of this worker's group, 0 being the outermost."""
    for _ in range(depth + 1):
        assert center.group is not None
        center = center.group
    return center


def _sizes(subgroup: Subgroup, inside: Subgroup | None) -> list[int]:
    """How many participants each subgroup has: subgroups inside, or workers."""
    if inside is None:
        return [len(ranks) for ranks in subgroup.subgroups]
    firsts = [ranks[0] for ranks in inside.subgroups]
    return [sum(rank in ranks for rank in firsts) for ranks in subgroup.subgroups]
