import pytest
import torch

from lightning_easgd.workloads.images import TensorImages
from lightning_easgd.workloads.sampling import (
    evaluation_shard,
    require_full_batch,
    whole_set_sampler,
)


def images(count):
    return TensorImages(torch.zeros(count, 1, 1, 1), torch.arange(count), lambda x: x)


def test_every_worker_shuffles_the_whole_set_in_orders_of_its_own():
    orders = []
    for rank in range(4):
        sampler = whole_set_sampler(images(50), seed=3, rank=rank)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4 * 5


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 4), (12, 4), (4, 4)])
def test_evaluation_shards_are_disjoint_and_complete(count, world_size):
    seen = []
    for rank in range(world_size):
        shard, sampler = evaluation_shard(images(count), rank=rank, world_size=world_size)
        drawn = [int(shard[index][1]) for index in sampler]
        assert drawn == list(range(rank, count, world_size))
        seen += drawn
    assert sorted(seen) == list(range(count))


def test_every_process_needs_an_evaluation_image():
    with pytest.raises(ValueError, match=r"3 examples; allowed is at least one.* 4 processes"):
        evaluation_shard(images(3), rank=0, world_size=4)


def test_every_worker_needs_a_batch():
    require_full_batch(images(10), sampling="sharded", batch_size=3, world_size=4)
    require_full_batch(images(10), sampling="whole", batch_size=10, world_size=4)
    with pytest.raises(ValueError, match=r"batch_size=4, but each worker has 3 .*1 to 3"):
        require_full_batch(images(10), sampling="sharded", batch_size=4, world_size=4)
    with pytest.raises(ValueError, match=r"batch_size=11, but each worker has 10"):
        require_full_batch(images(10), sampling="whole", batch_size=11, world_size=4)
