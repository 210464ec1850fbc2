"""One training run of some workers, and what its center is worth in the end."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from forking import Workers
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_easgd import CenterAverage, NonFiniteError
from lightning_easgd.workloads import experiment


@dataclass(frozen=True)
class Job:
    """A contender's turn."""

    contender: str
    tau: int | None
    """Optimizer steps between two exchanges; None if the contender has no such period."""
    seed: int

    def __str__(self) -> str:
        period = "" if self.tau is None else f", τ = {self.tau}"
        return f"{self.contender}{period}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What one job found."""

    contender: str
    tau: int | None
    seed: int
    settings: dict[str, Any]
    """The contender's configuration and the workload's, by which later runs know them again."""
    accuracy: float | None
    """Share of the test images that the delivered model got right; None if training diverged."""
    loss: float | None
    """Mean cross-entropy of the delivered model on the training images; None likewise."""
    diverged: str | None
    """How training diverged; None if it did not."""
    restarts: int
    """How often a worker with weights that were not finite began again at the center."""
    seconds: float

    @property
    def job(self) -> Job:
        """What found it."""
        return Job(self.contender, self.tau, self.seed)


class JobError(RuntimeError):
    """A job failed, which is not what diverging is called."""


class Workbench:
    """What all jobs share: the data, how many workers, for how long.

    Args:
        cfg: conf/compare.yaml, composed.
    """

    def __init__(self, cfg: DictConfig) -> None:
        torch.set_num_threads(1)  # workers are forked from here, which no thread would survive
        self._cfg = cfg
        self._data = instantiate(cfg.data)
        self._data.prepare_data()
        self._data.setup("fit")
        # Before there is a trainer: all images, not a worker's share.
        self._train, self._test = self._data.train_dataloader(), self._data.test_dataloader()

    def run(self, job: Job, settings: Mapping[str, Any]) -> Result:
        """Train and test in workers of their own.

        Raises:
            JobError: it failed, other than by diverging.
        """
        began = time.monotonic()
        with Workers(self._work, job, settings, workers=self._cfg.workers) as workers:
            outcomes = workers.collect(self._cfg.job_timeout)
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                raise JobError(f"{job} failed on worker {rank}:\n{outcome.trace}")
        return Result(
            contender=job.contender,
            tau=job.tau,
            seed=job.seed,
            settings=dict(settings),
            seconds=time.monotonic() - began,
            **outcomes[0].value,
        )

    def _work(self, rank: int, job: Job, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What one worker does; worker 0 returns what is found."""
        for name in ("", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        experiment.seed(job.seed)
        self._data.seed = job.seed  # of the shuffling, where workers see all images
        optimizer, strategy = (instantiate(settings[key]) for key in ("optimizer", "strategy"))
        module: pl.LightningModule = instantiate(self._cfg.module, optimizer=optimizer)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=self._cfg.workers,
            strategy=strategy,
            callbacks=experiment.callbacks(strategy, None, job.seed),
            max_epochs=self._cfg.epochs,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, datamodule=self._data)
        except NonFiniteError as error:
            reason = str(error).split(". ")[0]
            return {"accuracy": None, "loss": None, "diverged": reason, "restarts": 0}
        restarts = getattr(getattr(strategy, "telemetry", None), "non_finite", 0)
        return None if rank else self._judge(module) | {"restarts": restarts}

    def _judge(self, module: nn.Module) -> dict[str, Any]:
        """What the delivered model is worth; worse than guessing is diverged."""
        loss, _ = evaluate(module, self._train)
        _, accuracy = evaluate(module, self._test)
        guessing = math.log(self._cfg.data.num_classes)
        if loss <= guessing:
            return {"accuracy": accuracy, "loss": loss, "diverged": None}
        reason = f"the training loss was {loss:.3g}, that of guessing is {guessing:.3g}"
        return {"accuracy": None, "loss": None, "diverged": reason}


@torch.no_grad()
def evaluate(module: nn.Module, images: DataLoader[Any]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    module.eval()
    loss = right = total = 0.0
    for batch, labels in images:
        logits = module(batch)
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        right += float((logits.argmax(1) == labels).sum())
        total += len(labels)
    return loss / total, right / total


def moving_average(steps: float, tau: int) -> CenterAverage:
    """One that remembers some ``steps`` optimizer steps, however many exchanges these have."""
    return CenterAverage("ema", 1 - (1 - 1 / steps) ** tau)
