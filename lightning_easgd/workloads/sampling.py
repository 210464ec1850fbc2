"""Which worker sees which example."""

import math
from typing import Literal

from torch.utils.data import DistributedSampler, Subset

from lightning_easgd.workloads.sets import Batch, BatchSet

Sampling = Literal["sharded", "whole"]

# `DistributedSampler` adds the epoch to its seed; seeds one apart would make worker 1's first
# epoch the same as worker 0's second.
_SEED_STRIDE = 1_000_003


def whole_set_sampler(examples: BatchSet, *, seed: int, rank: int) -> DistributedSampler[Batch]:
    """Draws the whole set in an order of the worker's own, new in each epoch, as in the paper.

    It is a `DistributedSampler` of one replica because Lightning leaves those alone and tells them
    the epoch.

    Args:
        examples: The training set.
        seed: Common to all workers.
        rank: The worker's rank.
    """
    return DistributedSampler(
        examples, num_replicas=1, rank=0, shuffle=True, seed=seed + _SEED_STRIDE * rank
    )


def evaluation_shard(
    examples: BatchSet, *, rank: int, world_size: int
) -> tuple[Subset[Batch], DistributedSampler[Batch]]:
    """The examples `rank`, `rank + world_size`, ... and a sampler that draws each of them once.

    Lightning would insert a sampler that repeats examples until all ranks have equally many, which
    makes the accuracy inexact; it does not replace the one returned here.

    Args:
        examples: The evaluation set.
        rank: This process's rank.
        world_size: Number of processes.

    Raises:
        ValueError: If some rank would have no example; its peers would wait for it for ever.
    """
    if len(examples) < world_size:
        raise ValueError(
            f"The evaluation set has {len(examples)} examples; allowed is at least one for each "
            f"of the {world_size} processes. Use fewer processes or a larger set."
        )
    shard = Subset(examples, range(rank, len(examples), world_size))
    return shard, DistributedSampler(shard, num_replicas=1, rank=0, shuffle=False)


def require_full_batch(
    examples: BatchSet, *, sampling: Sampling, batch_size: int, world_size: int
) -> None:
    """Checks that every worker has at least one batch of training examples.

    Args:
        examples: The training set.
        sampling: "sharded" gives a worker its share of the set, "whole" all of it.
        batch_size: Examples per worker and step.
        world_size: Number of workers.

    Raises:
        ValueError: If a worker has fewer examples than a batch: incomplete batches are dropped.
    """
    workers = world_size if sampling == "sharded" else 1
    share = math.ceil(len(examples) / workers)
    if share < batch_size:
        raise ValueError(
            f"Got data.batch_size={batch_size}, but each worker has {share} training examples "
            f"({len(examples)} over {workers}), and incomplete batches are dropped. Allowed is "
            f"1 to {share}: use smaller batches or fewer workers."
        )
