"""What Trainer is given: how long, how often, and what is watched meanwhile."""

from __future__ import annotations

from collections import Counter
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar
from spring import Validated, assert_like_on_a_spring, training
from staying import run_workers
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset
from toy import trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (8, 2, 2)),
        ({"limit_train_batches": 5, "limit_val_batches": 1}, (5, 1, 1)),
        ({"limit_train_batches": 0.5, "limit_val_batches": 0}, (4, 0, 0)),
        ({"max_epochs": 3}, (24, 6, 2)),
        ({"max_epochs": -1, "max_steps": 11}, (11, 2, 2)),
        ({"max_epochs": 1, "min_steps": 4}, (8, 2, 2)),
        ({"max_epochs": 3, "overfit_batches": 2}, (6, 6, 2)),
        ({"fast_dev_run": 2}, (2, 2, 0)),
        ({"val_check_interval": 3}, (8, 4, 2)),
        ({"val_check_interval": 0.25}, (8, 8, 2)),
        ({"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 5}, (16, 6, 2)),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, (40, 4, 2)),
        ({"num_sanity_val_steps": 0}, (8, 2, 0)),
        ({"num_sanity_val_steps": 1}, (8, 2, 1)),
    ],
    ids=str,
)
def test_how_long_and_how_often(options: Any, expected: tuple[int, int, int]) -> None:
    """Batches of training, of validation and of the sanity check."""
    seen, *_ = assert_like_on_a_spring(training(partial(Validated, SGD), **options))
    stages = Counter(stage for stage, *_ in seen)
    assert tuple(stages[stage] for stage in ("train", "validate", "sanity_check")) == expected


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # barebones
@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"inference_mode": False},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"profiler": "advanced"},
        {"callbacks": [TQDMProgressBar], "enable_progress_bar": True},
        {"callbacks": [ModelSummary], "enable_model_summary": True},
        {"barebones": True, "logger": None},
        {"benchmark": True},
    ],
    ids=str,
)
def test_what_leaves_the_bits_alone(options: Any, tmp_path: Any) -> None:
    options = {"max_epochs": 2, "default_root_dir": tmp_path, **options}
    assert_like_on_a_spring(training(partial(Validated, SGD), **options))


@pytest.mark.skipif(find_spec("rich") is None, reason="rich is not installed")
def test_the_rich_progress_bar() -> None:
    bar = {"callbacks": [RichProgressBar], "enable_progress_bar": True}
    assert_like_on_a_spring(training(partial(Validated, SGD), **bar))


class Samples(Validated):
    """Eight numbered samples, in batches of two; notes the numbers of every epoch."""

    def __init__(self, sampler: Any = None) -> None:
        super().__init__(SGD)
        self.sampler = sampler
        self.epochs: list[list[int]] = []

    def train_dataloader(self) -> Any:
        self.epochs.append([])
        data = TensorDataset(torch.arange(8))
        sampler = self.sampler and self.sampler(data)
        return DataLoader(data, batch_size=2, sampler=sampler)

    def on_train_epoch_start(self) -> None:
        if not self.trainer.reload_dataloaders_every_n_epochs:
            self.epochs.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.epochs[-1] += batch[0].tolist()
        return (self.w**2).sum() + (self.b**2).sum()


def sample(rank: int, module: Samples, options: Any) -> Any:
    torch.manual_seed(0)
    trainer(2, EASGDStrategy(tau=3), max_epochs=2, **options).fit(module)
    return [epoch for epoch in module.epochs if epoch]


@pytest.mark.parametrize("every", [0, 1])
def test_every_worker_has_its_share_in_another_order_in_every_epoch(every: int) -> None:
    options = {"use_distributed_sampler": True, "reload_dataloaders_every_n_epochs": every}
    one, two = run_workers(sample, Samples(), options, workers=2)
    for mine, others in zip(one, two, strict=True):
        assert sorted(mine + others) == list(range(8))
    assert len(one) == 2
    assert one[0] != one[1]


def test_every_worker_has_what_the_user_gave_it_otherwise() -> None:
    options = {"use_distributed_sampler": False}
    assert run_workers(sample, Samples(), options, workers=2) == [[list(range(8))] * 2] * 2
    own = Samples(sampler=partial(DistributedSampler, num_replicas=4, rank=3, shuffle=False))
    for use in (True, False):
        options = {"use_distributed_sampler": use}
        assert run_workers(sample, own, options, workers=2) == [[[3, 7]] * 2] * 2
    drawn = Samples(sampler=partial(RandomSampler, num_samples=4))
    one, two = run_workers(sample, drawn, {"use_distributed_sampler": False}, workers=2)
    assert one == two
    assert [len(epoch) for epoch in one] == [4, 4]
