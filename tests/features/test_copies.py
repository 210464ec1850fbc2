"""Trainers, modules and callbacks that are copied while a fit runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from processes import run_script
from staying import run_workers
from toy import Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


class Validated(Toy):
    def __init__(self) -> None:
        super().__init__(SGD)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("norm", self.w.norm(), sync_dist=True)


class Copying(Callback):
    """Copies what users copy, and keeps a reference to the trainer as some callbacks do."""

    def __init__(self, copied: Callable[[Any], Any] | None) -> None:
        self.copied = copied
        self.copies: list[Any] = []

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.copied is not None:
            self.trainer, copies, self.copies = trainer, self.copies, []
            things = [trainer, pl_module, self, trainer.strategy, trainer.fit_loop]
            made = [self.copied(thing) for thing in things]
            del self.trainer
            self.copies = copies
            copies.append((made, weights(pl_module)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        if rest[-1] == 6:  # an exchange is under way
            self.look(trainer, pl_module)

    on_train_start = on_validation_start = on_train_end = look
    on_validation_epoch_end = on_fit_end = look


def fit(rank: int, copied: Callable[[Any], Any] | None) -> Any:
    copying, module = Copying(copied), Validated()
    timer = Timer({"hours": 1})
    strategy = EASGDStrategy(tau=4)
    options = {"max_epochs": 2, "callbacks": [copying, timer], "num_sanity_val_steps": 0}
    fitting = trainer(2, strategy, **options)
    fitting.fit(module, loader(rank, 10), loader(0, 2))
    if copied is None:
        return bits(weights(module)), None
    assert len(copying.copies) == 9
    for (other, its_module, callback, _, _), now in copying.copies:
        stock = other.fit_loop.epoch_loop._broadcast_sigterm_tensor
        assert stock.__self__ is other.fit_loop.epoch_loop
        (its_timer,) = [c for c in other.callbacks if isinstance(c, Timer)]
        assert its_timer._check_time_remaining.__self__ is its_timer
        assert callback.trainer.strategy is not strategy
        for held in (its_module, other.lightning_module, other.strategy.model):
            np.testing.assert_equal(weights(held), now)
    # It trains as the original does, from where it was copied.
    (other, *_), _ = copying.copies[1]
    assert other.global_step == 7
    again = Validated()
    (callback,) = [c for c in other.callbacks if isinstance(c, Copying)]
    callback.copied = None
    other.fit_loop.epoch_progress.reset()
    other.fit_loop.epoch_loop.reset()
    other.fit(again, loader(rank, 10), loader(0, 2))
    return bits(weights(module)), bits(weights(again))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_trainer_is_copied_as_under_ddp(copied: Callable[[Any], Any]) -> None:
    undisturbed = run_workers(fit, None, workers=2)
    disturbed = run_workers(fit, copied, workers=2)
    assert [bits for bits, _ in disturbed] == [bits for bits, _ in undisturbed]
    assert disturbed[0][1] == disturbed[1][1]


SCRIPT = """
import copy, sys
from functools import partial
import torch
from lightning.pytorch.callbacks import Callback
from toy import Toy, loader, trainer

class Copying(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        made = copy.deepcopy(trainer)
        assert not getattr(made.strategy.launcher, "procs", [])
        if trainer.is_global_zero:
            assert len(trainer.strategy.launcher.procs) == 1
            print("copied")

if __name__ == "__main__":
    module = Toy(partial(torch.optim.SGD, lr=0.1))
    trainer(2, "easgd", callbacks=[Copying()]).fit(module, loader(0, 3))
"""


def test_the_worker_that_started_the_others_is_copied_without_them(tmp_path: Path) -> None:
    """Under DDP it cannot be copied."""
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    printed = run_script(script, [], folder=tmp_path, workers=None)
    assert printed.count("copied") == 3
