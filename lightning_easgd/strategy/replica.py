"""What a worker of a group takes over from another one, whose steps it could not take itself."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_easgd.center.center import Center
from lightning_easgd.exchange.gradient_averaging import Replica
from lightning_easgd.exchange.optimizers import LocalOptimizers


def replica_of(trainer: pl.Trainer, center: Center, optimizers: LocalOptimizers) -> Replica:
    """Weights, optimizers, schedules and scaler of a worker in training.

    Args:
        trainer: of this worker.
        center: of its module.
        optimizers: its own.
    """
    module, strategy = trainer.lightning_module, trainer.strategy

    def read() -> dict[str, Any]:
        named = (pair for cohort in center.cohorts for pair in cohort.named)
        return {
            "weights": {name: parameter.detach() for name, parameter in named},
            "optimizers": [optimizer.state_dict() for optimizer in strategy.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": strategy.precision_plugin.state_dict(),
            "look_ahead": optimizers.look_ahead_state(),
        }

    def write(state: dict[str, Any]) -> None:
        here = dict(module.named_parameters())
        for name, value in state["weights"].items():
            here[name].data.copy_(value)
        for optimizer, saved in zip(strategy.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedules"], strict=True):
            config.scheduler.load_state_dict(saved)
        strategy.precision_plugin.load_state_dict(state["precision"])
        optimizers.load_look_ahead_state(state["look_ahead"])

    return Replica(read, write)
