"""Callbacks that change what is trained, when hooks run, and what is refused."""

from __future__ import annotations

import inspect
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from processes import Workers
from spring import Trace, Validated, state
from staying import run_workers
from torch import nn
from torch.utils.data import DataLoader
from toy import Batches, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


class Finetuned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return ((self.head(self.backbone(batch[0])) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return SGD([p for p in self.parameters() if p.requires_grad])


class Unfreezing(BackboneFinetuning):
    """Unfreezes again on resuming, which Lightning's leaves out: it restores the groups only."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Finetuned) -> None:
        unfrozen = self._restarting and self.previous_backbone_lr is not None
        super().on_fit_start(trainer, pl_module)
        if unfrozen:
            self.make_trainable(pl_module.backbone)


def finetune(rank: int, folder: Path, resume: int | None = None) -> Any:
    torch.manual_seed(0)
    module, trace = Finetuned(), Trace()
    callbacks: list[Callback] = [trace, Unfreezing(unfreeze_backbone_at_epoch=2)]
    if resume is None:
        saving = {"every_n_train_steps": 1, "save_top_k": -1}
        callbacks.append(ModelCheckpoint(folder, "{step}", **saving))
    options = {"max_epochs": 5, "callbacks": callbacks, "enable_checkpointing": resume is None}
    # The same batch again and again, for the loader does not know where it stands.
    data = DataLoader([Batches(rank, 1, torch.float32)[0]] * 5, batch_size=None)
    path = folder / f"step={resume}.ckpt" if resume else None
    trainer(2, EASGDStrategy(tau=4), **options).fit(module, data, ckpt_path=path)
    steps = {step: (rates, repr(weights)) for *_, step, rates, weights in trace.seen}
    return steps, repr(state(module))


def finetune_in_pieces(rank: int, folder: Path) -> Any:
    return finetune(rank, folder), {step: finetune(rank, folder, step) for step in (9, 11, 13, 17)}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before")
def test_finetuning_resumes_with_the_bits_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    # Unfrozen after step 10, announced by the exchange of step 12, joined from that of step 16 on.
    for (whole, end), pieces in run_workers(finetune_in_pieces, tmp_path, workers=2):
        for step, (steps, same_end) in pieces.items():
            assert steps == {n: seen for n, seen in whole.items() if n > step}, step
            assert same_end == end


def refused(rank: int, options: Any) -> None:
    fitting = trainer(2, EASGDStrategy(), **options)
    fitting.fit(Validated(SGD), loader(rank, 3), loader(rank, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [WeightAveraging()]}, "WeightAveraging averages one worker's weights"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging averages"),
        ({"callbacks": [ModelPruning("l1_unstructured")]}, "Remove it, and prune after fit"),
        (
            {"val_check_interval": timedelta(seconds=1), "check_val_every_n_epoch": None},
            "Give a number of batches",
        ),
    ],
    ids=["average", "swa", "pruning", "val_check_interval"],
)
def test_what_cannot_work_is_refused(options: Any, message: str) -> None:
    for outcome in run_workers(refused, options, workers=2, check=False):
        assert outcome.error == "MisconfigurationException"
        assert message in outcome.message


def hooks(*classes: type) -> list[str]:
    return [
        name
        for owner in classes
        for name, _ in inspect.getmembers(owner, inspect.isfunction)
        if name.startswith("on_") or name in ("setup", "teardown", "configure_model")
    ]


def recording(base: type, log: list[str], names: list[str]) -> Any:
    """A subclass of ``base`` that notes calls of its hooks."""

    def noting(name: str) -> Any:
        original = getattr(base, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append(f"{base.__name__}.{name}")
            return original(self, *args, **kwargs)

        # With the original's signature, which Lightning inspects.
        hook.__signature__ = inspect.signature(original)
        return hook

    return type("Recording", (base,), {name: noting(name) for name in names})


class Everything(Validated):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0] @ self.w + self.b


def call_hooks(rank: int, folder: Path) -> Any:
    outcomes = []
    for strategy in ("ddp", EASGDStrategy(tau=3)):
        log: list[str] = []
        module = recording(Everything, log, hooks(ModelHooks, DataHooks, CheckpointHooks))(SGD)
        callback = recording(Callback, log, hooks(Callback))()
        saving = ModelCheckpoint(folder / type(strategy).__name__)
        options = {"max_epochs": 2, "callbacks": [callback, saving], "enable_checkpointing": True}
        fitting = trainer(2, strategy, **options)
        data = loader(rank, 2)
        fitting.validate(module, data)
        fitting.fit(module, data, data)
        for use in (fitting.validate, fitting.test, fitting.predict):
            use(module, data)
        outcomes.append(log)
    return outcomes


def test_hooks_run_in_the_order_of_ddp(tmp_path: Path) -> None:
    for ddp, easgd in run_workers(call_hooks, tmp_path, workers=2):
        assert easgd == ddp
        assert {"Everything.on_before_zero_grad", "Callback.on_save_checkpoint"} <= set(easgd)


HOOKS = [
    *("setup", "configure_model", "configure_optimizers", "on_fit_start", "training_step"),
    *("on_before_optimizer_step", "validation_step", "on_train_epoch_end", "on_train_end"),
    "teardown",
]


def raising(rank: int, who: int, name: str) -> None:
    module = Everything(SGD)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(f"in {name}")

    if rank == who:
        setattr(module, name, fail)
    fitting = trainer(2, EASGDStrategy(tau=2), num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 8), loader(rank, 2))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("name", HOOKS)
def test_an_exception_in_a_hook_keeps_its_type_and_text(name: str, who: int) -> None:
    with Workers(raising, who, name, workers=2) as group:
        (outcome,) = group.collect(40, without=1 - who)
    assert (outcome.error, outcome.message) == ("ZeroDivisionError", f"in {name}")
