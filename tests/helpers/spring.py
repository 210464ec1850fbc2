"""What every feature is compared with: plain Lightning in one process, tied to a spring by hand.

Workers that draw the same batches stay equal, so one of them and the center are the whole of EASGD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from staying import run_workers
from torch import Tensor
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

TAU, WORKERS, ALPHA = 3, 2, 0.45


class Validated(Toy):
    """The toy with something to validate and to monitor."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("loss", (x @ self.w + self.b - y).abs().mean())


class Spring(SingleDeviceStrategy):
    """``WORKERS`` equal workers and their center, in one process."""

    def __init__(self, tau: int = TAU) -> None:
        super().__init__(torch.device("cpu"))
        self.tau = tau
        self.center: dict[Tensor, Tensor] = {}
        self.worker: dict[Tensor, Tensor] = {}

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
            self.center = {p: _precise(p).clone() for p in trained}

    def on_train_start(self) -> None:
        self.clock = self.lightning_module.trainer.global_step

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        pull = self.begin_exchange() if self.clock % self.tau == 0 else {}
        output = super().optimizer_step(*args, **kwargs)
        for parameter, d in pull.items():
            parameter.data.sub_(d)
        self.clock += 1
        return output

    def begin_exchange(self) -> dict[Tensor, Tensor]:
        pull = {p: ALPHA * (_precise(p) - c) for p, c in self.center.items()}
        for parameter, d in pull.items():
            self.center[parameter] = self.center[parameter] + WORKERS * d
        return pull

    def on_validation_start(self) -> None:
        self.worker = {p: p.detach().clone() for p in self.center}
        put(self.center)

    def on_validation_end(self) -> None:
        put(self.worker)

    def on_train_end(self) -> None:
        self.begin_exchange()
        put(self.center)

    def teardown(self) -> None:
        super().teardown()
        self.center = {}


def put(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.detach().copy_(value)


def _precise(parameter: Tensor) -> Tensor:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().float() if half else parameter.detach()


def state(module: torch.nn.Module) -> dict[str, Any]:
    """A copy of the state dict as arrays; real values as doubles, for NumPy has no bf16."""
    return {
        key: (v if v.is_complex() else v.double()).detach().numpy().copy()
        for key, v in module.state_dict().items()
    }


class Trace(Callback):
    """The weights after every batch and within every validation batch, and the learning rates."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        where = trainer.state.stage.value, trainer.current_epoch, trainer.global_step
        self.seen.append((*where, [float(rate) for rate in rates], state(pl_module)))

    on_train_batch_end = on_validation_batch_end = look


Scenario = Callable[[Callable[..., pl.Trainer]], Any]
"""Uses trainers, made by a function of Trainer's options, and returns what must be equal."""


def _play(rank: int, scenario: Scenario) -> Any:
    def on_a_spring(tau: int = TAU, **options: Any) -> pl.Trainer:
        return trainer(1, Spring(tau), **options)

    def under_easgd(tau: int = TAU, **options: Any) -> pl.Trainer:
        return trainer(WORKERS, EASGDStrategy(tau=tau), **options)

    outcomes = []
    for make_trainer in (on_a_spring, under_easgd) if rank == 0 else (under_easgd,):
        torch.manual_seed(0)
        outcomes.append(scenario(make_trainer))
    return outcomes


def assert_like_on_a_spring(scenario: Scenario, timeout: float = 60) -> Any:
    """Play a scenario on a spring and under EASGD; the bits must be the same on all workers.

    Returns what was the same.
    """
    (expected, *found), *others = run_workers(_play, scenario, workers=WORKERS, timeout=timeout)
    for outcome in chain(found, *others):
        np.testing.assert_equal(outcome, expected)
    return expected


def training(make_module: Callable[[], pl.LightningModule], **options: Any) -> Scenario:
    """A scenario that fits a module on eight batches an epoch, and validates it on two.

    Callbacks are given as functions that make them.
    """
    return partial(_train, make_module, options)


def _train(
    make_module: Callable[[], pl.LightningModule],
    options: dict[str, Any],
    make_trainer: Callable[..., pl.Trainer],
) -> Any:
    module, trace = make_module(), Trace()
    callbacks = [trace, *(make() for make in options.get("callbacks", ()))]
    fitting = make_trainer(**options | {"callbacks": callbacks})
    dtype = next(module.parameters()).dtype.to_real()
    fitting.fit(module, loader(0, 8, dtype), loader(1, 2, dtype))
    return trace.seen, state(module), fitting.global_step, fitting.current_epoch
