"""One training run from start to report."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from lightning_easgd import EASGDMonitor, EASGDStrategy


class SeedWorkers(Callback):
    """Lets every worker draw its own dropout masks and augmentations, repeatably.

    Args:
        seed: of worker 0 is ``seed + 1``, of worker 1 ``seed + 2``, and so on.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seed = self.seed + 1 + trainer.global_rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class Stopwatch(Callback):
    """Takes the time of training, with its validations and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began


def seed(value: int) -> None:
    """Make initial weights and shuffling repeatable; the same on all workers."""
    pl.seed_everything(value, workers=True, verbose=False)


def callbacks(strategy: Strategy, checkpoint: ModelCheckpoint | None, seed: int) -> list[Callback]:
    """The callbacks of a run: seeds, the checkpoint, and the exchanges' counters under EASGD."""
    chosen: list[Callback] = [SeedWorkers(seed)]
    if checkpoint is not None:
        chosen.append(checkpoint)
    if isinstance(strategy, EASGDStrategy):
        chosen.append(EASGDMonitor())
    return chosen


_WORTH_A_LINE, _STANDS_OUT = 0.01, 2.0
"""A straggler was waited for longer than this share of training, and so many times the others."""


@dataclass(frozen=True)
class Report:
    """What a run reached and cost. Bytes and seconds are of this node's first worker."""

    strategy: str
    workers: int
    tested: Mapping[str, float]
    """What ``trainer.test`` returned."""
    logged: Mapping[str, float]
    """What training and validation logged last."""
    steps: int
    exchanges: int | None
    bytes_sent: int | None
    bytes_inside: int | None
    """Of those, to workers of its own group."""
    ddp_bytes_sent: int | None
    wait_seconds: float | None
    checkpoint: str | None
    train_seconds: float | None = None
    """From the first batch to the last, validations and checkpoints among them."""
    worker_wait_seconds: list[float] = field(default_factory=list)
    """Waited by each worker, in rank order."""
    worker_awaited_seconds: list[float] = field(default_factory=list)
    """Others waited so long for each worker, in rank order."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """The report for a terminal."""
        rows = [("strategy", f"{self.strategy}, {self.workers} worker(s), {self.steps} steps each")]
        whose = ", of the center" if self.exchanges is not None else ""
        rows += [(name, f"{value:.5g}{whose}") for name, value in self.tested.items()]
        if self.exchanges is not None:
            rows += self._costs()
        rows.append(("checkpoint", self.checkpoint or "none written"))
        width = max(len(name) for name, _ in rows)
        return "\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    def _costs(self) -> list[tuple[str, str]]:
        assert self.bytes_sent is not None
        sent = [("sent by each worker", self._amount(self.bytes_sent))]
        if self.bytes_inside:  # the first worker of a group sends more than others
            between = self._amount(self.bytes_sent - self.bytes_inside)
            sent = [
                ("sent by worker 0", self._amount(self.bytes_sent)),
                ("  of that, to other groups", between),
            ]
        return [
            ("exchanges", str(self.exchanges)),
            *sent,
            ("waited", f"{self.wait_seconds:.2f} of {self.train_seconds:.1f} s"),
            *self._straggler(),
        ]

    def _straggler(self) -> list[tuple[str, str]]:
        """The worker that stands out as the one that the others waited for."""
        awaited, total = self.worker_awaited_seconds, self.train_seconds or 0.0
        *others, longest = sorted(awaited) or [0.0]
        usual = statistics.median(others) if others else 0.0
        if longest <= max(_WORTH_A_LINE * total, _STANDS_OUT * usual):
            return []
        worker = awaited.index(longest)
        return [(f"worker {worker} was waited for", f"{longest:.1f} of {total:.1f} s")]

    def _amount(self, sent: int) -> str:
        amount = f"{sent / 1e6:.2f} MB"
        if self.ddp_bytes_sent:
            share = sent / self.ddp_bytes_sent
            amount += f", {100 * share:.1f} % of DDP's {self.ddp_bytes_sent / 1e6:.2f} MB"
        return amount


def require_all_processes(trainer: pl.Trainer) -> None:
    """Check that the processes that were started all train together.

    Raises:
        ValueError: the strategy does not use all of them.
    """
    processes = int(os.environ.get("WORLD_SIZE", trainer.world_size))
    if processes != trainer.world_size:
        raise ValueError(
            f"{type(trainer.strategy).__name__} trains in {trainer.world_size} process(es), but"
            f" {processes} were started. Set trainer.devices={trainer.world_size}, or another"
            " strategy."
        )


def run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    *,
    train: bool,
    test: bool,
    ckpt_path: str | None,
) -> Report:
    """Train and test, as asked, and report.

    Args:
        trainer: knows devices, length, strategy and callbacks.
        module: the model.
        datamodule: the data; None if the module brings its own loaders.
        train: whether to train, from the checkpoint if one is given.
        test: whether to test at the end: what was trained, else the checkpoint.
        ckpt_path: a checkpoint to resume from or to test; "last" for the newest, if there is one.

    Raises:
        ValueError: the strategy does not use all processes that were started, or there is neither
            training nor a checkpoint to test.
    """
    require_all_processes(trainer)
    # Lightning 2.6 on newer torch warns of itself, on every worker.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
    if ckpt_path == "last":
        # It is meant to be missing on the first start, and to be there on all others.
        warnings.filterwarnings("ignore", ".*there is no last checkpoint available")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    checkpoint: str | None = None
    logged: dict[str, float] = {}
    stopwatch = Stopwatch()
    if train:
        trainer.callbacks.insert(0, stopwatch)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint = _save_end(trainer)
    tested: dict[str, float] = {}
    if test:
        path = None if train else ckpt_path
        for loader in trainer.test(module, datamodule, ckpt_path=path, verbose=False):
            tested |= loader
        if not train:
            checkpoint = _tested(trainer)
    telemetry = getattr(trainer.strategy, "telemetry", None) if train else None
    return Report(
        strategy=type(trainer.strategy).__name__,
        workers=trainer.world_size,
        tested=tested,
        logged=logged,
        steps=trainer.global_step,
        exchanges=getattr(telemetry, "exchanges", None),
        bytes_sent=getattr(telemetry, "bytes_sent", None),
        bytes_inside=getattr(telemetry, "bytes_inside", None),
        ddp_bytes_sent=getattr(telemetry, "ddp_bytes_sent", None),
        wait_seconds=getattr(telemetry, "wait_seconds", None),
        checkpoint=checkpoint,
        train_seconds=stopwatch.seconds if train else None,
        worker_wait_seconds=getattr(telemetry, "worker_wait_seconds", []),
        worker_awaited_seconds=getattr(telemetry, "worker_awaited_seconds", []),
    )


def _save_end(trainer: pl.Trainer) -> str | None:
    """Save what was delivered, the weights after the final exchange, beside the checkpoints.

    The checkpoints themselves stay points to resume from.
    """
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.dirpath is None:
        return None
    path = os.path.join(checkpoint.dirpath, "final.ckpt")
    trainer.save_checkpoint(path, weights_only=True)
    return path


def _tested(trainer: pl.Trainer) -> str:
    """The checkpoint that was tested."""
    if trainer.ckpt_path is None:
        raise ValueError(
            "train=false tested a network that nothing was loaded into. Set ckpt_path to a"
            " checkpoint that exists."
        )
    return os.fspath(trainer.ckpt_path)
