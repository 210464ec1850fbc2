"""One training run of some workers, and what its center is worth in the end."""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from comparing.result import Job
from lightning_easgd import CenterAverage, NonFiniteError
from lightning_easgd.workloads import experiment
from lightning_easgd.workloads.report import count_bytes


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

    def work(self, rank: int, job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What one worker does and counted; worker 0 also says what the model is worth."""
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
            return {"diverged": str(error).split(". ")[0]}
        restarts = getattr(getattr(strategy, "telemetry", None), "non_finite", 0)
        counted = count_bytes(trainer, module)
        return ({} if rank else self._judge(module)) | counted | {"restarts": restarts}

    def _judge(self, module: nn.Module) -> dict[str, Any]:
        """What the delivered model is worth; worse than guessing is diverged."""
        test_loss, accuracy = evaluate(module, self._test)
        loss = evaluate(module, self._train)[0] if self._cfg.train_loss else None
        images, judged = ("test", test_loss) if loss is None else ("training", loss)
        guessing = math.log(self._cfg.data.num_classes)
        if judged <= guessing:
            return {"score": accuracy, "loss": loss}
        return {
            "diverged": f"the {images} loss was {judged:.3g}, that of guessing is {guessing:.3g}"
        }


def gathered(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all workers of a job returned, as fields of its result."""
    names = ("score", "loss", "diverged", "restarts")
    found = {name: workers[0][name] for name in names if name in workers[0]}
    for name, counted in (("sent_bytes", "bytes_sent"), ("ddp_bytes", "ddp_bytes_sent")):
        if all(counted in worker for worker in workers):
            found[name] = statistics.fmean(worker[counted] for worker in workers)
    return found


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
