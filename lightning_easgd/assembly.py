"""Puts the parts of an exchange together, as the options have it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_easgd.center import Center
from lightning_easgd.communication import InsideAllReduce, Island, WorkerGroup, make_all_reduce
from lightning_easgd.exchange import Exchange
from lightning_easgd.features import refuse_own_losses
from lightning_easgd.gradients import GradientAverage
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.options import Options
from lightning_easgd.replica import replica_of
from lightning_easgd.telemetry import Telemetry
from lightning_easgd.tree import GroupLevel


def make_center(module: pl.LightningModule, options: Options, rank: int) -> Center:
    """The center of a worker's module, which is equal on all workers, and that of its group.

    Raises:
        ValueError: the module has no parameter to train, or cannot be cut into so many fragments.
    """
    return Center(
        module,
        buffers=options.buffers,
        rank=rank,
        turns=options.rules.period.fragments,
        offload=options.offload,
        averaging=options.averaging,
        group=Center(module, buffers="local", rank=rank) if options.tied else None,
    )


def make_exchange(
    center: Center,
    group: WorkerGroup,
    options: Options,
    *,
    groups: Sequence[Sequence[int]],
    trainer: pl.Trainer,
    telemetry: Telemetry,
) -> Exchange:
    """The link between this worker and the others; all of them must call it.

    Args:
        center: of this worker's module.
        group: all workers.
        options: equal on all of them.
        groups: the ranks of every group; none if every worker takes part by itself.
        trainer: with the optimizers.
        telemetry: where costs are counted.

    Raises:
        ValueError: the strength is unstable for this number of workers, or an optimizer cannot be
            used where gradients are averaged.
        ExchangeError: a worker left or did not come in time.
    """
    rules = options.rules
    optimizers = LocalOptimizers(lambda: trainer.strategy.optimizers)
    warm_up = rules.algorithm.warm_up
    together = groups or ([list(range(group.size))] if warm_up else [])
    island = Island(group, together, options.bucket_bytes) if together else None
    gradients, level = None, None
    if island is not None and options.tied is not None:
        assert center.group is not None
        level = GroupLevel(
            center.group,
            InsideAllReduce(group, options.bucket_bytes, island),
            options.tied,
            sizes=[len(ranks) for ranks in groups],
            optimizers=optimizers,
            from_iterate=rules.elastic_point == "iterate",
            telemetry=telemetry,
        )
    elif island is not None:
        refuse_own_losses(trainer.strategy.optimizers)
        gradients = GradientAverage(
            island,
            list(trainer.lightning_module.parameters()),
            replica=replica_of(trainer, center, optimizers),
            telemetry=telemetry,
            until=warm_up or None,
            inside=bool(groups),
        )
    all_reduce = make_all_reduce(
        group,
        options.bucket_bytes,
        options.codec,
        feedback=rules.algorithm.restarts,
        groups=groups,
        island=island,
        agrees=level is None,
    )
    trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
    telemetry.ddp_bytes_per_step = all_reduce.ring_bytes(trained)
    return Exchange(
        center,
        all_reduce,
        optimizers=optimizers,
        rules=rules,
        telemetry=telemetry,
        gradients=gradients,
        level=level,
    )
