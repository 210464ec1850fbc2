"""The number that a sweeper optimizes: found in the end, missed early, and judged on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from searching import Judge, Rivals


def objective(name: str | None, report: Mapping[str, Any]) -> float | None:
    """The number of this name that the run tested or logged; None if none is sought.

    Raises:
        ValueError: there is none of this name.
    """
    found = {**report["logged"], **report["tested"]}
    if name is None:
        return None
    if name not in found:
        raise _missing(name, "was neither tested nor logged", found)
    return found[name]


class Sought(Callback):
    """Ends a run whose first epoch shows that it will not have the number that is sought.

    Args:
        name: of the number.
        tested: whether a test follows, which may log it.
    """

    def __init__(self, name: str, *, tested: bool) -> None:
        self._name, self._tested = name, tested
        self._validated = self._looked = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All that validation logs is there."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look once, behind an epoch that was validated, if any is."""
        found = trainer.callback_metrics
        if self._looked or (trainer.enable_validation and not self._validated):
            return
        self._looked = True
        if self._name in found or (self._tested and self._name.startswith("test")):
            return
        error = _missing(self._name, "was not logged in the first epoch that was validated", found)
        if not self._tested or self._name.startswith(("train", "val")):
            raise error
        rank_zero_warn(f"{error} Or it is of the test, which follows.")


class Prune(Callback):
    """Ends a run early that is judged to promise little: all its workers at the same validation.

    Worker 0 reports what the validation found, and the others follow it as in EarlyStopping.

    Args:
        name: of the number.
        rivals: of the run.
    """

    def __init__(self, name: str, rivals: Rivals) -> None:
        self._name, self._rivals = name, rivals
        self._judge: Judge | None = None
        self.pruned = False
        """Whether the run ended so."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse workers of which none can end the others."""
        if getattr(trainer.strategy, "solo", False):
            raise ValueError(
                "A search cannot end runs early whose workers go each at its own pace. Set"
                " hydra.sweeper.pruner=null."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, and stop if that is the answer."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        ends = trainer.is_global_zero and self._ends(trainer)
        self.pruned = trainer.strategy.reduce_boolean_decision(ends, all=False)
        trainer.should_stop = trainer.should_stop or self.pruned

    def _ends(self, trainer: pl.Trainer) -> bool:
        if self._name not in trainer.callback_metrics:  # Sought says so
            return False
        value = float(trainer.callback_metrics[self._name])
        if not math.isfinite(value):
            return True
        self._judge = self._judge or self._rivals.judge()
        return self._judge(value)


def _missing(name: str, why: str, found: Iterable[str]) -> ValueError:
    allowed = ", ".join(sorted(found)) or "none, for nothing was"
    return ValueError(
        f"objective={name} {why}. Allowed are {allowed}."
        " Correct the name, or let the module log it. What validation logs is there once it has"
        " run: see trainer.check_val_every_n_epoch."
    )
