"""One training run from start to report."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_easgd import EASGDMonitor, EASGDStrategy
from lightning_easgd.workloads.report import Report, Stopwatch, describe


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


def seed(value: int) -> None:
    """Make initial weights and shuffling repeatable; the same on all workers."""
    pl.seed_everything(value, workers=True, verbose=False)


def callbacks(strategy: Strategy, checkpoint: ModelCheckpoint | None, seed: int) -> list[Callback]:
    """The callbacks of a run: seeds, the checkpoint, and the exchanges' counters under EASGD."""
    chosen: list[Callback] = [SeedWorkers(seed)]
    if checkpoint is not None:
        chosen.append(checkpoint)
    if isinstance(strategy, EASGDStrategy):
        chosen.append(EASGDMonitor(progress_bar=True))
    return chosen


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


def require_test(module: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> None:
    """Check that there is a test to make after training, not when training is over.

    Raises:
        ValueError: the module has no test step, or nobody has data for it.
    """
    data = module if datamodule is None else datamodule
    for name, owner in (("test_step", module), ("test_dataloader", data)):
        if not is_overridden(name, owner):
            raise ValueError(
                f"test=true, but {type(owner).__name__} has no {name}. Write one, or set"
                " test=false."
            )


def run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    *,
    train: bool,
    test: bool,
    ckpt_path: str | None,
    pruned: Callable[[], bool] = lambda: False,
) -> Report:
    """Train and test, as asked, and report.

    Args:
        trainer: knows devices, length, strategy and callbacks.
        module: the model.
        datamodule: the data; None if the module brings its own loaders.
        train: whether to train, from the checkpoint if one is given.
        test: whether to test at the end: what was trained, else the checkpoint.
        ckpt_path: a checkpoint to resume from or to test; "last" for the newest, if there is one.
        pruned: whether training was ended early as promising little, and no test follows.

    Raises:
        ValueError: the strategy does not use all processes that were started, there is nothing to
            test, or neither training nor a checkpoint to test.
    """
    require_all_processes(trainer)
    if test:
        require_test(module, datamodule)
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
    ended_early = train and pruned()
    if test and not ended_early:
        path = None if train else ckpt_path
        for loader in trainer.test(module, datamodule, ckpt_path=path, verbose=False):
            tested |= loader
        if not train:
            checkpoint = _tested(trainer)
    described = describe(trainer, module, datamodule, stopwatch if train else None)
    return Report(
        **described, tested=tested, logged=logged, checkpoint=checkpoint, pruned=ended_early
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
