"""What chaos.py strikes: a small training that must not forget anything, in several processes."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from forking import FORK, Workers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.digest import fingerprint
from lightning_easgd.workloads.loading import ResumableLoader

EPOCHS, STEPS_PER_EPOCH = 6, 6
CHECKPOINT_EVERY = 3
EXCHANGE_TIMEOUT = 1.0
A_WHILE, FOR_EVER = 0.1, 1000.0
"""Seconds for which a loader pauses before every batch."""
_LIMIT_SECONDS = 90.0
_POLL_SECONDS = 2e-4


class Workload(pl.LightningModule):
    """Regression with all that a checkpoint must not forget: momentum, statistics, chance."""

    def __init__(self, steps: Any, pauses: Any) -> None:
        super().__init__()
        self.pauses = pauses
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)
        )
        self.steps = steps

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of a batch."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """Nesterov momentum under a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, *_: Any) -> None:
        """Wait for a loader that is slow, or stuck."""
        time.sleep(self.pauses[self.global_rank])

    def on_train_batch_end(self, *_: Any) -> None:
        """Tell the others how far this worker is."""
        self.steps[self.global_rank] = self.global_step


def train(folder: Path, workers: int, steps: Any, pauses: Any) -> tuple[int, str]:
    """What one worker does: train from the newest checkpoint; a digest of the center delivered."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    module = Workload(steps, pauses)
    saving = ModelCheckpoint(
        folder, "last", every_n_train_steps=CHECKPOINT_EVERY, enable_version_counter=False
    )
    trainer = pl.Trainer(
        strategy=EASGDStrategy(
            tau=4,
            strict_resume=True,
            exchange_timeout=EXCHANGE_TIMEOUT,
            timeout=timedelta(seconds=10),
        ),
        accelerator="cpu",
        devices=workers,
        max_epochs=EPOCHS,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(1 + trainer.global_rank)
    x = torch.randn(STEPS_PER_EPOCH * 4, 8)
    loader = ResumableLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")
    return fingerprint(module.state_dict())


class Struck(Workers):
    """Workers that train in ``folder``, to be struck at a chosen step."""

    def __init__(self, folder: Path, count: int) -> None:
        self.steps, self.pauses = FORK.RawArray("q", count), FORK.RawArray("d", count)
        self.delivered: list[Any] = [None] * count
        super().__init__(_work, folder, count, self.steps, self.pauses, workers=count)

    def reach(self, rank: int, step: int) -> bool:
        """Wait until a worker has taken ``step`` steps; False if it ended before."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while self.steps[rank] < step:
            if not self.processes[rank].is_alive():
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker {rank} did not reach step {step}")
            time.sleep(_POLL_SECONDS)
        return True

    def strike(self, rank: int, number: signal.Signals) -> bool:
        """Send a signal to a worker; False if it ended before."""
        runs = self.runs(rank)
        if runs:
            os.kill(self.processes[rank].pid, number)
        return runs

    def runs(self, rank: int) -> bool:
        """Whether a worker has not ended."""
        return bool(self.processes[rank].is_alive())

    def reap(self, *, stopped: int | None = None) -> None:
        """Wait until all workers but one that is stopped have ended.

        Raises:
            TimeoutError: one did not end.
        """
        outcomes = self.collect(_LIMIT_SECONDS, without=stopped)
        ranks = [rank for rank in range(len(self.processes)) if rank != stopped]
        for rank, outcome in zip(ranks, outcomes, strict=True):
            self.delivered[rank] = outcome.value


def _work(rank: int, folder: Path, count: int, steps: Any, pauses: Any) -> tuple[int, str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not on the folder's own disk, if it has one.
    log = os.open(
        folder.with_name(f"{folder.name}.worker{rank}.log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        return train(folder, count, steps, pauses)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise
