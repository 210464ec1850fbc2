from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler

from lightning_easgd.workloads.data import Digits


def digits(**options):
    return Digits(
        **{"batch_size": 16, "image_size": 8, "in_channels": 1, "num_classes": 10} | options
    )


def of_rank(rank, world_size, **options):
    data = digits(**options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.setup("fit")
    return data


def drain(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_are_tensors_of_equal_size_and_the_rest_is_dropped():
    data = digits(batch_size=100)
    data.setup("fit")
    sizes = [
        (tuple(images.shape), tuple(labels.shape)) for images, labels in data.train_dataloader()
    ]
    assert sizes == [((100, 1, 8, 8), (100,))] * 14


def test_setup_reads_once_and_only_what_the_stage_needs(monkeypatch):
    data, reads = digits(), []
    load = data.load
    monkeypatch.setattr(
        data, "load", lambda place, split: reads.append(split) or load(place, split)
    )
    data.setup("test")
    assert reads == ["test"]
    data.setup("fit")
    data.setup("fit")
    assert reads == ["test", "train"]


def test_sharded_sampling_leaves_the_sampler_to_lightning():
    loader = of_rank(1, 4).train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)


def test_whole_sampling_keeps_lightning_away_and_differs_between_workers():
    loaders = [of_rank(rank, 4, sampling="whole").train_dataloader() for rank in range(2)]
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)
    orders = [list(loader.sampler) for loader in loaders]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1437))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [1, 4, 7])
def test_evaluation_covers_the_test_set_exactly_once(world_size):
    everything = drain(of_rank(0, 1).test_dataloader())
    parts = [drain(of_rank(rank, world_size).val_dataloader()) for rank in range(world_size)]
    for rank, (images, labels) in enumerate(parts):
        assert torch.equal(images, everything[0][rank::world_size])
        assert torch.equal(labels, everything[1][rank::world_size])
    assert sum(len(labels) for _, labels in parts) == 360


def test_who_evaluates_alone_has_all_of_the_set_and_trains_on_a_share():
    data = of_rank(1, 4)
    data.trainer.strategy = SimpleNamespace(solo=True)
    assert len(drain(data.val_dataloader())[1]) == len(drain(data.test_dataloader())[1]) == 360
    assert isinstance(data.train_dataloader().sampler, RandomSampler)


def test_crops_are_random_in_training_and_central_in_evaluation():
    data = digits(image_size=6, augment="crop_flip")
    data.setup("fit")
    whole = digits()
    whole.setup("fit")
    evaluated = drain(data.test_dataloader())[0]
    assert torch.equal(evaluated, drain(whole.test_dataloader())[0][..., 1:7, 1:7])
    data.train_dataloader()
    first, second = (data._sets["train"].__getitems__(list(range(50)))[0] for _ in range(2))
    assert first.shape == (50, 1, 6, 6)
    assert not torch.equal(first, second)


def test_pixels_are_standardized_by_the_configured_mean_and_deviation():
    plain, scaled = of_rank(0, 1), of_rank(0, 1, mean=0.5, std=0.25)
    for loader in ("train_dataloader", "val_dataloader"):
        torch.manual_seed(0)
        images, labels = next(iter(getattr(plain, loader)()))
        torch.manual_seed(0)
        others, same_labels = next(iter(getattr(scaled, loader)()))
        torch.testing.assert_close(others, (images - 0.5) / 0.25)
        assert torch.equal(labels, same_labels)


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=400, but each worker has 360"):
        of_rank(0, 4, batch_size=400).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0; allowed is 1"),
        ({"std": 0.0}, r"std=0.0; allowed is a number above 0"),
        ({"sampling": "some"}, r"sampling='some'; allowed are 'sharded' and 'whole'"),
        ({"augment": "flip"}, r"augment='flip'; allowed are 'none' and 'crop_flip'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, r"num_classes=7, but digits has 10 classes"),
        ({"in_channels": 3}, r"shape \(1, 8, 8\).*is \(3, 8, 8\)"),
        ({"image_size": 9}, r"image_size=9; allowed by digits is 1 to 8"),
    ],
)
def test_arguments_that_the_images_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options).setup("fit")
