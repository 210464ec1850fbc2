"""The module is the center for all of a validation, whatever user code does there."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from staying import run_workers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)
HOOKS = ["on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"]
ENDS = ["on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"]


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return all(left[k].tobytes() == right[k].tobytes() for k in left)


def center_of(module: pl.LightningModule) -> dict[str, np.ndarray]:
    state = module.trainer.strategy.center_state_dict()
    return {name: value.double().numpy().copy() for name, value in state.items()}


class Looking(Toy):
    """Notes what hooks of a validation see, and what the worker is before and after."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.seen: dict[str, Any] = {}
        self.before: Any = None
        self.after: Any = None
        for name in [*HOOKS, *ENDS]:
            setattr(self, name, partial(self.look, name))

    def look(self, name: str, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            self.seen[name] = weights(self)
            self.seen.setdefault("center", center_of(self))

    def on_train_batch_end(self, *_: Any) -> None:
        self.before = weights(self)

    def on_validation_model_eval(self) -> None:
        self.look("eval")
        super().on_validation_model_eval()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.look("train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("step")

    def on_train_epoch_end(self) -> None:
        self.after = weights(self)


class LookingCallback(Callback):
    """The same of a callback's hooks, which run before the module's."""

    def __init__(self) -> None:
        for name in [*HOOKS, *ENDS]:
            setattr(self, name, partial(self.look, name))

    def look(self, name: str, trainer: pl.Trainer, module: Looking, *_: Any) -> None:
        module.look(f"callback's {name}")


def look(rank: int, options: dict[str, Any]) -> Any:
    module = Looking()
    fitting = trainer(2, EASGDStrategy(tau=3, **options), callbacks=[LookingCallback()])
    fitting.fit(module, loader(rank, 8), loader(0, 2))
    return module.before, module.seen, module.after


def test_all_hooks_of_a_validation_see_the_center() -> None:
    both = run_workers(look, {}, workers=2)
    for before, seen, after in both:
        assert len(seen) > len([*HOOKS, *ENDS])
        assert all(same(center, both[0][1]["center"]) for center in seen.values())
        assert same(before, after)
        assert not same(before, seen["center"])


def test_none_does_where_the_worker_is_validated() -> None:
    for before, seen, after in run_workers(look, {"evaluate_on": "worker"}, workers=2):
        assert all(same(before, mine) for name, mine in seen.items() if name != "center")
        assert same(before, after)


class Averaging(Callback):
    """A user's running average, which takes the weights' place from one hook to another."""

    def __init__(self, first: str, last: str, *, by_pointer: bool) -> None:
        self.by_pointer, self.shown = by_pointer, 0
        setattr(self, first, self.swap)
        setattr(self, last, self.swap)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.shadow = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for shadow, parameter in zip(self.shadow, module.parameters(), strict=True):
            shadow.lerp_(parameter.detach(), 0.1)

    def swap(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for shadow, parameter in zip(self.shadow, module.parameters(), strict=True):
            if self.by_pointer:
                parameter.data, shadow.data = shadow.data, parameter.data
            else:
                kept = parameter.detach().clone()
                parameter.data.copy_(shadow)
                shadow.copy_(kept)


def average(rank: int) -> Any:
    found = []
    for by_pointer in (False, True):
        for first, last in zip(HOOKS[:2], reversed(ENDS[1:]), strict=True):
            averaging = Averaging(first, last, by_pointer=by_pointer)
            plain, swapping = Looking(), Looking()
            for module, callbacks in ((plain, []), (swapping, [averaging])):
                fitting = trainer(2, EASGDStrategy(tau=3), max_epochs=2, callbacks=callbacks)
                fitting.fit(module, loader(rank, 8), loader(0, 2))
            saw = same(plain.seen["step"], swapping.seen["step"])
            found.append((same(weights(plain), weights(swapping)), saw))
    return found


def test_pairs_of_hooks_that_swap_weights_change_no_bit_of_training() -> None:
    assert run_workers(average, workers=2) == [[(True, False)] * 4] * 2


class ScheduleFree(torch.optim.SGD):
    """Has one point to train at, and another one to be evaluated at."""

    training = True

    def turn(self, training: bool, offset: float) -> None:
        if self.training != training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(2.0**offset)
        self.training = training

    def eval(self) -> None:
        self.turn(False, 1)

    def train(self) -> None:
        self.turn(True, -1)


class WithModes(Toy):
    def __init__(self) -> None:
        super().__init__(partial(ScheduleFree, lr=0.1))
        self.seen: Any = None

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.center = center_of(self)
        self.optimizers().eval()

    def on_validation_model_train(self) -> None:
        self.optimizers().train()
        super().on_validation_model_train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen = weights(self)


def use_modes(rank: int) -> Any:
    module, plain = WithModes(), Toy(SGD)
    trainer(2, EASGDStrategy(tau=3), num_sanity_val_steps=0).fit(
        module, loader(rank, 8), loader(0, 1)
    )
    trainer(2, EASGDStrategy(tau=3)).fit(plain, loader(rank, 8))
    return module.seen, module.center, same(weights(module), weights(plain))


def test_an_optimizer_with_modes_is_evaluated_on_the_center() -> None:
    for seen, center, unchanged in run_workers(use_modes, workers=2):
        assert same(seen, {name: 2 * value for name, value in center.items()})
        assert unchanged


class WithPoints(ScheduleFree):
    """Is evaluated between what it trains and a state of its own, as schedule-free ones are."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("z", parameter.detach() + 0.3)
        return loss

    def turn(self, training: bool, offset: float) -> None:
        weight = 1 - 0.9**offset
        for parameter, state in self.state.items() if self.training != training else ():
            parameter.data.lerp_(state["z"], weight)
        self.training = training


def use_points(rank: int) -> Any:
    module = WithModes()
    module.make_optimizer = partial(WithPoints, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"max_epochs": 3, "num_sanity_val_steps": 0}
        trainer(2, EASGDStrategy(tau=3), **options).fit(module, loader(rank, 8), loader(0, 1))
    return [text for w in caught if "worker" in (text := str(w.message))]


def test_an_optimizer_whose_modes_mix_in_a_state_of_each_worker_is_said_once() -> None:
    for (message,) in run_workers(use_points, workers=2):
        assert message.startswith("'WithPoints' has eval() and train()")
        assert "Leave eval() out" in message


class LowRank(nn.Linear):
    """Merges its adapter into the frozen weight in eval(), and takes it out in train()."""

    def __init__(self) -> None:
        super().__init__(3, 2, bias=False, dtype=torch.float64)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        adapter = 0 if self.merged else x @ self.a.T @ self.b.T
        return nn.functional.linear(x, self.weight) + adapter


class Adapted(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = LowRank()
        self.frozen = self.net.weight.detach().clone()
        self.errors: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        state = self.trainer.strategy.center_state_dict()
        expected = batch[0] @ (self.frozen + state["net.b"] @ state["net.a"]).T
        self.errors.append(float((self.net(batch[0]) - expected).abs().max()))

    def configure_optimizers(self) -> Any:
        return SGD([self.net.a, self.net.b])


def merge(rank: int) -> Any:
    module = Adapted()
    data = loader(rank, 8), loader(0, 1)
    trainer(2, EASGDStrategy(tau=3), max_epochs=3).fit(module, *data)
    module.train()
    return module.errors, float((module.net.weight - module.frozen).abs().max())


def test_layers_that_merge_weights_in_eval_take_out_what_they_put_in() -> None:
    for errors, moved in run_workers(merge, workers=2):
        assert len(errors) == 4
        assert max(errors) < 1e-12
        assert moved < 1e-12


class Normalised(nn.Module):
    """Scales by the first batch it sees."""

    def __init__(self, flag: nn.Module, way: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.flags, self.way = [flag], way

    def forward(self, x: Tensor) -> Tensor:
        flag = self.flags[0]
        if not flag.done:
            with torch.no_grad():
                self.scale.copy_(1 / x.std(0))
            if self.way == "filled":
                flag.done.fill_(True)
            else:
                flag.done = torch.tensor(True)
            flag.seen = torch.full((len(x),), 1.0)
        return x * self.scale


class Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.tensor(False))
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)


class Initialised(Toy):
    """What is initialised lies apart from the flag that says so."""

    def __init__(self, way: str, when: int) -> None:
        super().__init__(SGD)
        self.flag, self.when = Flag(), when
        self.norm = Normalised(self.flag, way)
        self.at: dict[str, Any] = {}

    def on_validation_batch_start(self, *_: Any) -> None:
        self.flag.calls += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.when == self.current_epoch and not self.trainer.sanity_checking:
            self.norm(batch[0])
            self.at["inside"] = bool(self.flag.done), self.norm.scale.tolist()

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == self.when:
            self.at["after"] = bool(self.flag.done), self.norm.scale.tolist()
            self.at["calls"], self.at["cache"] = int(self.flag.calls), len(self.flag.seen)


def initialise(rank: int, way: str) -> Any:
    module = Initialised(way, when=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"max_epochs": 3, "num_sanity_val_steps": 0}
        trainer(2, EASGDStrategy(tau=3), **options).fit(module, loader(rank, 4), loader(rank, 1))
    told = [str(w.message) for w in caught if "The module held the center" in str(w.message)]
    return module.at, told


@pytest.mark.parametrize("way", ["filled", "replaced"])
def test_an_initialisation_by_validation_is_undone_with_its_flag_and_said(way: str) -> None:
    for at, told in run_workers(initialise, way, workers=2):
        assert at["inside"][0]
        assert at["after"] == (False, [1.0] * 3)
        assert at["calls"] == 1  # of two validations; the second was undone
        assert at["cache"] == 4  # of another shape than before
        (message,) = told
        assert "validation, and 'norm.scale' was written to" in message
        assert "'flag.calls', 'flag.done'" in message or "'flag.done', 'flag.calls'" in message


class TrainingLength(Toy):
    """Is validated in train(), where normalisations and spectral norms go on to move."""

    def __init__(self) -> None:
        super().__init__(SGD)
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(2, momentum=None, dtype=torch.float64)
        self.layer = spectral_norm(nn.Linear(2, 2, dtype=torch.float64))
        self.held: list[Any] = []

    def on_validation_model_eval(self) -> None:
        self.held.append(self.statistics())

    def on_train_epoch_end(self) -> None:
        self.held.append(self.statistics())

    def statistics(self) -> Any:
        return self.norm.running_mean.tolist(), int(self.norm.num_batches_tracked)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.layer(self.norm(batch[1])).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(self.norm(batch[1]))


def validate_in_train(rank: int) -> Any:
    module = TrainingLength()
    before: list[Any] = []
    module.on_train_batch_end = lambda *_: before.append(module.statistics())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"num_sanity_val_steps": 0}
        trainer(2, EASGDStrategy(tau=3), **options).fit(module, loader(rank, 4), loader(rank, 2))
    told = [text for w in caught if "The module held" in (text := str(w.message))]
    return module.held[-1] == before[-1], module.held[-1][1], told


def test_statistics_that_move_in_a_validation_are_no_write() -> None:
    assert run_workers(validate_in_train, workers=2) == [(True, 4, [])] * 2


def count(rank: int) -> Any:
    module = Initialised("filled", when=-1)
    fitting = trainer(2, EASGDStrategy(tau=3), max_epochs=3, num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 4), loader(rank, 2))
    return int(module.flag.calls)


def test_buffers_stay_as_validation_left_them_where_nothing_is_undone() -> None:
    assert run_workers(count, workers=2) == [6, 6]


class Codebook(Toy):
    """Fills its codes, a float buffer, by the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.register_buffer("codes", torch.zeros(4, 3, dtype=torch.float64))
        self.register_buffer("filled", torch.tensor(False))
        self.at: list[Any] = []

    def fill(self, batch: Any) -> None:
        if not self.filled:
            self.codes.copy_(batch[0])
            self.filled.fill_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at.append((bool(self.filled), bool(self.codes.any())))
        self.fill(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.fill(batch)


def fill(rank: int) -> Any:
    module = Codebook()
    strategy = EASGDStrategy(tau=3, buffers={"codes": "average"})
    trainer(2, strategy).fit(module, loader(rank, 4), loader(0, 1))
    return module.at


def test_what_a_sanity_check_initialises_stays() -> None:
    assert run_workers(fill, workers=2) == [[(True, True)] * 4] * 2
