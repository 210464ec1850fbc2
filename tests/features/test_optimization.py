"""Optimizers, schedules, accumulation and clipping, in all the ways of a LightningModule."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from modules import Gan
from processes import run_workers
from spring import Validated, assert_like_on_a_spring, training
from torch.optim import lr_scheduler
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
        partial(torch.optim.Adam, lr=0.05, amsgrad=True),
        partial(torch.optim.Adam, lr=torch.tensor(0.05), foreach=False),
        partial(torch.optim.AdamW, lr=0.05, fused=True),
        partial(torch.optim.RMSprop, lr=0.05, centered=True),
        partial(torch.optim.Adagrad, lr=0.05),
        partial(torch.optim.Rprop, lr=0.05),
    ],
    ids=["lbfgs", "amsgrad", "tensor lr", "fused", "rmsprop", "adagrad", "rprop"],
)
def test_optimizers(make: Any) -> None:
    assert_like_on_a_spring(training(partial(Validated, make)))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"accumulate_grad_batches": 3}, 3 * 3),  # the last of eight batches ends a step too
        ({"callbacks": [partial(GradientAccumulationScheduler, {0: 1, 1: 4})]}, 8 + 2 + 2),
        ({"gradient_clip_val": 0.2}, 24),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 24),
    ],
    ids=["accumulate", "accumulation changes", "clip norm", "clip value"],
)
def test_accumulation_and_clipping(options: Any, steps: int) -> None:
    *_, taken, _ = assert_like_on_a_spring(
        training(partial(Validated, SGD), max_epochs=3, **options)
    )
    assert taken == steps


def test_parameter_groups() -> None:
    groups = [{"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.2, "momentum": 0.0}]
    assert_like_on_a_spring(training(partial(Validated, SGD, groups=groups)))


class Scheduled(Validated):
    """With a schedule, configured as Lightning takes it."""

    def __init__(self, make: Any, **config: Any) -> None:
        super().__init__(SGD)
        self.make_schedule, self.config = make, config

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = {"scheduler": self.make_schedule(optimizer), **self.config}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@pytest.mark.parametrize(
    ("make", "config", "rates"),
    [
        (partial(lr_scheduler.StepLR, step_size=5, gamma=0.5), {"interval": "step"}, 5),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=24), {"interval": "step"}, 24),
        (partial(lr_scheduler.ExponentialLR, gamma=0.5), {"interval": "step", "frequency": 6}, 4),
        (partial(lr_scheduler.ExponentialLR, gamma=0.5), {"interval": "epoch"}, 4),
        (
            partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1.0),
            {"monitor": "loss"},
            3,
        ),
    ],
    ids=["step", "one cycle", "frequency", "epoch", "plateau"],
)
def test_schedules(make: Any, config: Any, rates: int) -> None:
    seen, *_ = assert_like_on_a_spring(training(partial(Scheduled, make, **config), max_epochs=3))
    assert len({lr for *_, (lr,), _ in seen}) == rates


class ScheduledGan(Gan, Validated):
    """Both optimizers have a schedule, which steps with the discriminator's."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if batch_idx % 2:
            for schedule in self.lr_schedulers():
                schedule.step()

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [lr_scheduler.ExponentialLR(each, 0.9) for each in optimizers]


def test_a_gan_under_manual_optimization() -> None:
    *_, steps, _ = assert_like_on_a_spring(training(ScheduledGan, max_epochs=2))
    assert steps == 16 + 8


class Customized(Validated):
    """Overrides what Lightning lets a module do itself: backward, clipping, steps and schedules."""

    def __init__(self) -> None:
        super().__init__(SGD)

    def backward(self, loss: Any) -> None:
        (2 * loss).backward()

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, 0.3, "value")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 3 == 2:
            closure()  # a batch without a step
        else:
            optimizer.step(closure=closure)

    def lr_scheduler_step(self, schedule: Any, metric: Any) -> None:
        schedule.step(epoch=self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_a_module_that_overrides_the_steps() -> None:
    seen, *_ = assert_like_on_a_spring(training(Customized, max_epochs=2))
    w = [weights["w"].tolist() for stage, *_, weights in seen if stage == "train"]
    assert [a == b for a, b in pairwise(w[:6])] == [False, True, False, False, True]


class Growing(Validated):
    """Its optimizer gets the second parameter while training."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.optimizers().optimizer.add_param_group({"params": [self.b], "lr": 0.05})

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([self.w])


def test_a_parameter_group_that_is_added_while_training() -> None:
    seen, *_ = assert_like_on_a_spring(training(partial(Growing, SGD)))
    b = {step: weights["b"].tolist() for stage, _, step, _, weights in seen if "train" in stage}
    assert b[1] == b[4] != b[5]


def skip(rank: int) -> None:
    module = Toy(SGD)
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        return None if rank == 1 and batch_idx == 3 else step(batch, batch_idx)

    module.training_step = training_step
    trainer(2, EASGDStrategy(tau=2, exchange_timeout=10)).fit(module, loader(rank, 7))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_that_is_skipped_is_refused_by_lightning_as_under_ddp() -> None:
    other, skipping = run_workers(skip, workers=2, check=False)
    assert skipping.error == "RuntimeError"
    assert "returning None in distributed training is not supported" in skipping.message
    assert other.error == "ExchangeError"
    assert re.search("Worker 1 ended with .RuntimeError: Skipping the `train", other.message)
