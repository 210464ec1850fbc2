"""Training begins where user code has left the weights, whichever hook it wrote them in."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from staying import run_workers
from torch import nn
from toy import loader, trainer, weights

from lightning_easgd import EASGDStrategy, Groups

OF_MODULES = ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]
OF_CALLBACKS = [*OF_MODULES, "on_sanity_check_start", "on_sanity_check_end", "setup"]


class Loaded(pl.LightningModule):
    """Trains at a rate of 0, so that what is delivered is where training began."""

    def __init__(self, hook: str | None = None, value: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.value, self.lr = value, 0.0
        if hook is not None:
            setattr(self, hook, self.load)

    def load(self, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for tensor in [*self.parameters(), self.norm.running_mean]:
                tensor.fill_(self.value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.norm.eval()
        return self.norm(self.part(batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.part.parameters()], lr=self.lr)


class Loading(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, module, *_, **__: module.load())


def fit(rank: int, module: Any, callbacks: Any = (), workers: int = 2, **options: Any) -> Any:
    strategy = EASGDStrategy(tau=2, **options)
    data = loader(rank, 4, torch.float32), loader(0, 1, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(workers, strategy, callbacks=list(callbacks)).fit(module, *data)
    told = [str(w.message) for w in caught if "do not begin" in str(w.message)]
    return {**weights(module), "mean": module.norm.running_mean.numpy()}, told


def load_in_hooks(rank: int, options: Any, of_callbacks: list[str]) -> Any:
    ends = [fit(rank, Loaded(hook), **options) for hook in OF_MODULES]
    return ends + [fit(rank, Loaded(), [Loading(hook)], **options) for hook in of_callbacks]


@pytest.mark.parametrize(
    ("options", "of_callbacks"),
    [
        ({}, OF_CALLBACKS),
        ({"algorithm": "local_sgd"}, OF_CALLBACKS[-3:]),
        ({"center_average": "polyak"}, OF_CALLBACKS[-3:]),
        ({"fragments": 2}, OF_CALLBACKS[-3:]),
    ],
)
def test_weights_loaded_in_any_hook_before_the_first_batch_are_trained(
    options: Any, of_callbacks: list[str]
) -> None:
    for ends in run_workers(load_in_hooks, options, of_callbacks, workers=2):
        assert len(ends) == len(OF_MODULES) + len(of_callbacks)
        for end, told in ends:
            assert not told
            assert all((value == 3).all() for value in end.values()), end


@pytest.mark.parametrize("groups", [2, Groups(2, tau=1)], ids=["group", "tree"])
def test_and_so_in_groups(groups: Any) -> None:
    options = {"groups": groups, "workers": 4}
    for ends in run_workers(load_in_hooks, options, OF_CALLBACKS[-3:], workers=4, timeout=120):
        for end, told in ends:
            assert not told
            assert all((value == 3).all() for value in end.values()), end


def load_unequal(rank: int, hook: str) -> Any:
    return fit(rank, Loaded(hook, value=rank + 5.0))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_of_unequal_weights_those_of_worker_0_are_trained_and_all_say_so(hook: str) -> None:
    for end, (message,) in run_workers(load_unequal, hook, workers=2):
        assert all((value == 5).all() for value in end.values()), end
        assert (
            "parameter 'frozen', parameter 'part.weight', parameter 'part.bias' and 1 more"
            in message
        )
        assert "seed_everything" in message


def test_unequal_weights_behind_that_are_an_error_with_the_way_out() -> None:
    for outcome in run_workers(load_unequal, "on_train_epoch_start", workers=2, check=False):
        assert outcome.error == "ExchangeError"
        assert "in on_train_epoch_start or on_train_batch_start, write the same" in outcome.message


class Ranked(Loaded):
    """Has a buffer that differs by nature."""

    def __init__(self) -> None:
        super().__init__("on_fit_start")
        self.register_buffer("rank", torch.tensor(0))

    def load(self, *_: Any) -> None:
        super().load()
        self.rank.fill_(self.trainer.global_rank + 1)


def keep_local(rank: int) -> Any:
    module = Ranked()
    return fit(rank, module)[1], int(module.rank)


def test_buffers_of_the_workers_own_may_differ() -> None:
    assert run_workers(keep_local, workers=2) == [([], 1), ([], 2)]


def find_then_load(rank: int, folder: Path) -> Any:
    os.chdir(folder)  # the finder leaves a checkpoint where it works
    module = Loaded()
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None, update_attr=False)
    begin = []
    module.on_train_epoch_end = lambda: begin.append(
        module.trainer.strategy.center_state_dict()["part.weight"].numpy()
    )
    return fit(rank, module, [finder, Loading("on_fit_start")])[0], begin


def test_weights_loaded_behind_a_search_for_the_learning_rate_are_trained(tmp_path: Path) -> None:
    for end, _ in run_workers(find_then_load, tmp_path, workers=2):
        assert all((value == 3).all() for value in end.values()), end


def save_at_start(rank: int, folder: Path) -> Any:
    """A checkpoint of what one hook loaded, resumed by a module whose hook loads something else."""
    module = Loaded("on_fit_start")
    path = folder / "start.ckpt"
    saving = Callback()
    saving.on_train_batch_end = lambda t, m, *_: t.save_checkpoint(path)
    fit(rank, module, [saving])
    later = Loaded("on_train_start", value=7.0)
    fitting = trainer(2, EASGDStrategy(tau=2), max_epochs=2)
    seen = []
    later.on_train_batch_start = lambda *_: seen.append(
        fitting.strategy.center_state_dict()["part.weight"].numpy()
    )
    fitting.fit(later, loader(rank, 4, torch.float32), ckpt_path=path)
    return seen[0]


def test_the_saved_center_counts_where_training_resumes(tmp_path: Path) -> None:
    for center in run_workers(save_at_start, tmp_path, workers=2):
        np.testing.assert_array_equal(center, 3.0)


class Early(Callback):
    """Saves and reads before training begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.center = trainer.strategy.center_state_dict()["part.weight"].numpy()
        trainer.save_checkpoint(self.path)


def save_early(rank: int, path: Path) -> Any:
    early = Early(path)
    fit(rank, Loaded("on_fit_start"), [early])
    again = Loaded("on_fit_start", value=4.0)
    fitting = trainer(2, EASGDStrategy(tau=2))
    with pytest.warns(UserWarning, match="That is undone: what the checkpoint holds counts"):
        fitting.fit(again, loader(rank, 4, torch.float32), ckpt_path=path)
    return early.center, weights(again)["part.weight"]


def test_before_training_the_module_is_the_center(tmp_path: Path) -> None:
    for center, resumed in run_workers(save_early, tmp_path / "early.ckpt", workers=2):
        assert (center == 3).all()
        assert (resumed == 3).all()
    saved = torch.load(tmp_path / "early.ckpt", weights_only=True)["state_dict"]
    assert (saved["part.weight"] == 3).all()
