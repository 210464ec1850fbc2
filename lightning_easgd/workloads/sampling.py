"""Which worker sees which image."""

import math
from typing import Literal

from torch.utils.data import DistributedSampler, Subset

from lightning_easgd.workloads.images import Batch, ImageSet

Sampling = Literal["sharded", "whole"]

# `DistributedSampler` adds the epoch to its seed; seeds one apart would make worker 1's first
# epoch the same as worker 0's second.
_SEED_STRIDE = 1_000_003


def whole_set_sampler(images: ImageSet, *, seed: int, rank: int) -> DistributedSampler[Batch]:
    """Draws the whole set in an order of the worker's own, new in each epoch, as in the paper.

    It is a `DistributedSampler` of one replica because Lightning leaves those alone and tells them
    the epoch.

    Args:
        images: The training set.
        seed: Common to all workers.
        rank: The worker's rank.
    """
    return DistributedSampler(
        images, num_replicas=1, rank=0, shuffle=True, seed=seed + _SEED_STRIDE * rank
    )


def evaluation_shard(
    images: ImageSet, *, rank: int, world_size: int
) -> tuple[Subset[Batch], DistributedSampler[Batch]]:
    """The images `rank`, `rank + world_size`, ... and a sampler that draws each of them once.

    Lightning would insert a sampler that repeats images until all ranks have equally many, which
    makes the accuracy inexact; it does not replace the one returned here.

    Args:
        images: The evaluation set.
        rank: This process's rank.
        world_size: Number of processes.

    Raises:
        ValueError: If some rank would have no image; its peers would wait for it for ever.
    """
    if len(images) < world_size:
        raise ValueError(
            f"The evaluation set has {len(images)} images; allowed is at least one for each of the "
            f"{world_size} processes. Use fewer processes or a larger set."
        )
    shard = Subset(images, range(rank, len(images), world_size))
    return shard, DistributedSampler(shard, num_replicas=1, rank=0, shuffle=False)


def require_full_batch(
    images: ImageSet, *, sampling: Sampling, batch_size: int, world_size: int
) -> None:
    """Checks that every worker has at least one batch of training images.

    Args:
        images: The training set.
        sampling: "sharded" gives a worker its share of the set, "whole" all of it.
        batch_size: Images per worker and step.
        world_size: Number of workers.

    Raises:
        ValueError: If a worker has fewer images than a batch: incomplete batches are dropped.
    """
    workers = world_size if sampling == "sharded" else 1
    share = math.ceil(len(images) / workers)
    if share < batch_size:
        raise ValueError(
            f"Got data.batch_size={batch_size}, but each worker has {share} training images "
            f"({len(images)} over {workers}), and incomplete batches are dropped. Allowed is "
            f"1 to {share}: use smaller batches or fewer workers."
        )
