"""Parts of a module that user code replaces, adds or ties behind set-up."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy import Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy, Groups

SGD = partial(torch.optim.SGD, lr=0.1)
HOOKS = ["on_fit_start", "on_train_start"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Changing(Toy):
    """A hook changes the module in one of many ways, the same on all workers."""

    def __init__(self, hook: str, how: str) -> None:
        super().__init__(torch.optim.SGD)
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 2, dtype=torch.float64)
        self.norm: nn.Module = nn.Identity()
        self.hook, self.how = hook, how
        setattr(self, hook, self.change)

    def change(self, *_: Any, **__: Any) -> None:
        if self.hook == "on_train_epoch_start" and self.current_epoch != 1:
            return
        torch.manual_seed(1)
        getattr(self, self.how)()
        self.trainer.strategy.optimizers = [self.configure_optimizers()]

    def nothing(self) -> None:
        pass

    def replaced(self) -> None:
        self.second = nn.Linear(3, 2, dtype=torch.float64)

    def resized(self) -> None:
        self.first = nn.Linear(3, 5, dtype=torch.float64)
        self.second = nn.Linear(5, 2, dtype=torch.float64)

    def assigned(self) -> None:
        state = {name: value + 1 for name, value in self.state_dict().items()}
        self.load_state_dict(state, assign=True)

    def normalised(self) -> None:
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def parametrized(self) -> None:
        parametrize.register_parametrization(self.second, "weight", Doubled())

    def tied(self) -> None:
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight

    def tied_by_memory(self) -> None:
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight.data = self.first.weight.data

    def in_other_precision(self) -> None:
        self.first.float()

    def drawn_by_each(self) -> None:
        torch.manual_seed(self.trainer.global_rank)
        self.replaced()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch[0].to(self.first.weight.dtype)).double()
        return (self.norm(self.second(x)[:, :2]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD([p for n, p in self.named_parameters() if n not in ("w", "b")])


WAYS = [
    *("nothing", "replaced", "resized", "assigned", "normalised", "parametrized", "tied"),
    *("tied_by_memory", "in_other_precision"),
]


class BuiltSo(Changing):
    """What is changed before set-up, to compare with."""

    def __init__(self, how: str) -> None:
        super().__init__("setup", how)

    def change(self, *_: Any, **__: Any) -> None:
        torch.manual_seed(1)
        getattr(self, self.how)()


def fit(rank: int, module: Toy, options: Any, workers: int = 2, **others: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        others = {"max_epochs": 2, **others}
        path = others.pop("ckpt_path", None)
        trainer(workers, EASGDStrategy(tau=3, **options), **others).fit(
            module, loader(rank, 5), ckpt_path=path
        )
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    state = {name: value.double().numpy().copy() for name, value in module.state_dict().items()}
    return bits(state), [t for t in told if "worker" in t]


def change_all(rank: int, options: Any, workers: int) -> Any:
    """By default in each hook, else in every other way in the same."""
    found = {}
    for number, how in enumerate(WAYS):
        hooks = [HOOKS[number % 2]] if options else HOOKS
        ends = [fit(rank, Changing(hook, how), options, workers) for hook in hooks]
        found[how] = fit(rank, BuiltSo(how), options, workers), ends
    return found


@pytest.mark.parametrize(
    ("options", "workers"),
    [({}, 2), ({"algorithm": "post_local_sgd"}, 2), ({"groups": Groups(2, tau=1)}, 4)],
    ids=["easgd", "warm-up", "tree"],
)
def test_what_is_changed_before_training_takes_part_as_if_built_so(
    options: Any, workers: int
) -> None:
    every = run_workers(change_all, options, workers, workers=workers, timeout=150)
    for found in every:
        for how, (expected, ends) in found.items():
            assert expected == every[0][how][0], how
            assert expected[1] == [], how
            assert ends == [expected] * len(ends), how


def draw_by_each(rank: int) -> Any:
    module = Changing("on_train_start", "drawn_by_each")
    return fit(rank, module, {})


def test_what_each_worker_draws_anew_is_that_of_worker_0_and_said() -> None:
    both = run_workers(draw_by_each, workers=2)
    assert both[0][0] == both[1][0]
    for _, (message,) in both:
        assert message.startswith("The workers do not begin with the same weights: parameter")
        assert "second.weight" in message


class OneAlone(Changing):
    def change(self, *_: Any, **__: Any) -> None:
        if self.trainer.global_rank == 1:
            super().change()


def test_what_one_worker_alone_changes_is_an_error_on_all() -> None:
    def change(rank: int) -> Any:
        return fit(rank, OneAlone("on_train_start", "resized"), {})

    for outcome in run_workers(change, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "second.weight (2, 5)" in outcome.message


def change_later(rank: int, how: str) -> Any:
    return fit(rank, Changing("on_train_epoch_start", how), {}, max_epochs=3)[1]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("replaced", "'second.weight', 'second.bias'"),
        ("assigned", "'w', 'b', 'first.weight' and 3 more"),
    ],
)
def test_what_is_replaced_while_training_is_said_once_with_its_name(how: str, names: str) -> None:
    for (message,) in run_workers(change_later, how, workers=2):
        assert message.startswith(names)
        assert "registered after training began" in message
        assert "copy_()" in message


def resume(rank: int, folder: Path) -> Any:
    def save(epochs: int, path: str | None = None) -> Any:
        keep = ModelCheckpoint(folder, "last", enable_version_counter=False)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [keep]}
        return fit(rank, Changing("on_fit_start", "replaced"), {}, ckpt_path=path, **options)[0]

    whole = save(3)
    save(1)
    return whole == save(3, str(folder / "last.ckpt"))


def test_a_run_resumes_with_the_saved_values_of_what_is_replaced_again(tmp_path: Path) -> None:
    assert run_workers(resume, tmp_path, workers=2) == [True, True]


class Resizing(Toy):
    """Empty buffers, and an attribute, grow in their own memory, as torch's observers let them."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.register_buffer("seen", torch.empty(0, dtype=torch.float64), persistent=False)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.resize_(batch_idx + 1)
        self.mean.resize_(4)
        return super().training_step(batch, batch_idx)


def resize(rank: int, folder: Path) -> Any:
    module = Resizing()
    keep = ModelCheckpoint(folder, every_n_train_steps=2)
    fit(rank, module, {}, enable_checkpointing=True, callbacks=[keep])
    return len(module.seen), len(module.mean), np.isfinite(weights(module)["w"]).all()


def test_buffers_may_be_resized_in_place(tmp_path: Path) -> None:
    assert run_workers(resize, tmp_path, workers=2) == [(5, 4, True)] * 2
