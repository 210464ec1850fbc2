"""Takes down how far training is, says where it goes on, and carries the curves on."""

from __future__ import annotations

import csv
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from going_on import Steps
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger


class Progress(Callback):
    """Of a run in a folder, which may have been started there before.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: Steps | None = None
        self._curves: list[Curves] = []

    def begin(self, trainer: pl.Trainer) -> None:
        """Keep what earlier starts wrote, before loggers begin anew."""
        # All that is in the folder is there to go on with.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        if trainer.is_global_zero:
            self._steps = Steps(self._folder)
            tables = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
            self._curves = [Curves(logger) for logger in tables]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say from where training goes on."""
        if self._steps is not None:
            if said := _beginning(trainer, self._steps.before):
                print(said, flush=True)
            for curves in self._curves:
                curves.go_on(trainer.global_step)
            self._steps.write(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take down the step."""
        if self._steps is not None:
            self._steps.write(trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Note when it was raised: what follows, before it is seen outside, may take long."""
        exception.raised_at = time.monotonic()  # type: ignore[attr-defined]


class Curves:
    """A table of Lightning's, which it would delete when it begins a new one of the same name.

    Args:
        logger: which has begun none yet.
    """

    def __init__(self, logger: CSVLogger) -> None:
        self._logger = logger
        table = Path(logger.log_dir, "metrics.csv")
        self._copy = table.with_suffix(".before.csv")
        if table.exists() and not self._copy.exists():  # else the last start did not come so far
            shutil.copy(table, self._copy)

    def go_on(self, step: int) -> None:
        """Have the rows before a step in the new table, too."""
        if not self._copy.exists():
            return
        with self._copy.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        for row in rows:
            known = {name: float(value) for name, value in row.items() if value and name != "step"}
            self._logger.log_metrics(known, int(row["step"]))
        self._logger.save()
        self._copy.unlink()


def _beginning(trainer: pl.Trainer, before: int | None) -> str:
    step, restarts = trainer.global_step, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts:
        allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
        lost = max(0, (before or 0) - step)
        return f"restart {restarts} of {allowed}, from step {step}; {lost} steps lost"
    return f"Training goes on from step {step}." if trainer.ckpt_path else ""
