"""Bare runs to be measured: the model, endless data, and a stopwatch."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_easgd.workloads.classifier import Classifier
from lightning_easgd.workloads.models import CNN

NEVER = 10**9
"""A period τ that no run reaches."""


class Stopwatch(pl.Callback):
    """Times the batches of a fit from batch ``first`` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """After each batch."""
        if args[2] >= self.first - 1:
            self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the end of batch ``first - 1`` to the end of the last."""
        return self.ends[-1] - self.ends[0]

    def per_batch(self) -> list[float]:
        """Seconds of each batch."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


class Endless(torch.utils.data.IterableDataset[tuple[Tensor, ...]]):
    """One batch, again and again."""

    def __init__(self, *batch: Tensor) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        """Never ends."""
        while True:
            yield self.batch


def fit(
    module: pl.LightningModule,
    data: Any,
    strategy: Strategy,
    *callbacks: pl.Callback,
    steps: int,
    **options: Any,
) -> pl.Trainer:
    """A bare fit of ``steps`` steps, and what did it."""
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        callbacks=list(callbacks),
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1} | options),
    )
    trainer.fit(module, data)
    return trainer


def classifier(lr: float = 0.05) -> Classifier:
    """The 0.8 M-parameter CNN."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return Classifier(CNN(1, 10, 28), optimizer, schedule="constant", num_classes=10)
