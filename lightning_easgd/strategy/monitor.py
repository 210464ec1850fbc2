"""What the exchanges cost and found, in Lightning's loggers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_easgd.strategy.lightning_internals import logged_step
from lightning_easgd.strategy.strategy import EASGDStrategy


class EASGDMonitor(Callback):
    """Logs the telemetry of worker 0 as ``easgd/...`` every ``log_every_n_steps`` batches.

    Causes no communication: the counters are the worker's own.

    Raises:
        MisconfigurationException: at set-up, if the trainer runs another strategy.
    """

    def __init__(self) -> None:
        self._logged: int | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, EASGDStrategy):
            raise MisconfigurationException(
                f"EASGDMonitor got a trainer with {type(trainer.strategy).__name__}. It logs what"
                " EASGDStrategy counts: remove the callback or set Trainer(strategy='easgd')."
            )
        self._logged = None

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        period = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if logged_step(trainer) % period == 0:
            self._log(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        assert isinstance(trainer.strategy, EASGDStrategy)
        step = logged_step(trainer)
        if step == self._logged:  # batches whose gradients are accumulated share a step
            return
        self._logged = step
        metrics = {f"easgd/{k}": v for k, v in trainer.strategy.telemetry.metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
