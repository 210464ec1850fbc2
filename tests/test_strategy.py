"""What a Lightning user sees: evaluation, checkpoints, buffers, freezing, features, errors."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import StrategyRegistry
from staying import run_workers
from torch import nn
from toy import Toy, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDMonitor, EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)


def arrays(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: value.detach().double().numpy().copy() for key, value in state.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


class Evaluated(Toy):
    """Records what validation and the checkpoints see."""

    def __init__(self, *args: Any, fail_at: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before: list[Any] = []
        self.inside: list[Any] = []
        self.after: list[Any] = []
        self.fail_at = fail_at

    def on_fit_start(self) -> None:
        self.own = weights(self)

    def on_train_batch_end(self, *_: Any) -> None:
        self.own = weights(self)

    def on_validation_model_eval(self) -> None:
        self.before.append(self.own)
        super().on_validation_model_eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        state = arrays(self.trainer.strategy.center_state_dict())
        self.inside.append((weights(self), state))
        if self.fail_at == len(self.inside):
            raise ZeroDivisionError("inside validation")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.after.append(weights(self))


def evaluate(rank: int, options: dict[str, Any]) -> Any:
    module = Evaluated(SGD)
    fitting = trainer(2, EASGDStrategy(tau=3, **options), val_check_interval=4)
    fitting.fit(module, loader(rank, 12), loader(rank, 1))
    return module.before, module.inside, module.after, weights(module)


def test_validation_runs_on_the_center_and_gives_the_worker_its_weights_back() -> None:
    results = run_workers(evaluate, {}, workers=2)
    for before, inside, after, final in results:
        assert len(before) == len(inside) == 4  # the sanity check, and after steps 4, 8, 12
        for seen, state in inside:
            assert_same(seen, state)
        for check, step in [(0, 0), (1, 4), (2, 8)]:
            assert_same(before[check], after[step])
        for check in (1, 2, 3):
            assert not np.array_equal(before[check]["w"], inside[check][0]["w"])
        assert_same(final, results[0][3])
    for (ours, _), (theirs, _) in zip(results[0][1], results[1][1], strict=True):
        assert_same(ours, theirs)


def test_evaluate_on_worker_leaves_every_worker_its_own_weights() -> None:
    results = run_workers(evaluate, {"evaluate_on": "worker"}, workers=2)
    for before, inside, _, final in results:
        for own, (seen, _) in zip(before, inside, strict=True):
            assert_same(own, seen)
        assert not np.array_equal(inside[2][0]["w"], inside[2][1]["w"])
        assert_same(final, results[0][3])


def fail_inside_validation(rank: int) -> Any:
    module, strategy = Evaluated(SGD, fail_at=2), EASGDStrategy(tau=3)
    with pytest.raises(ZeroDivisionError):
        trainer(2, strategy, val_check_interval=4).fit(module, loader(rank, 12), loader(rank, 1))
    center = arrays(strategy.center_state_dict())
    return module.before[1], weights(module), module.inside[1][0], center


def test_an_exception_inside_validation_gives_the_worker_its_weights_back() -> None:
    for own, left, center, state in run_workers(fail_inside_validation, workers=2):
        assert_same(own, left)
        assert_same(state, center)
        assert not np.array_equal(own["w"], center["w"])


class Saved(Toy):
    """The toy with something to monitor, and a module that needs nothing to be loaded."""

    def __init__(self) -> None:
        super().__init__(SGD)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)


def save(rank: int, folder: str) -> Any:
    module, seen = Saved(), []
    checkpoint = ModelCheckpoint(folder, filename="{step}", monitor="loss", save_top_k=-1)
    fitting = trainer(
        2,
        EASGDStrategy(tau=3),
        val_check_interval=4,
        enable_checkpointing=True,
        callbacks=[checkpoint],
    )
    module.on_train_batch_end = lambda *_: seen.append(arrays(fitting.strategy.center_state_dict()))
    fitting.fit(module, loader(rank, 12), loader(rank, 2))
    fitting.save_checkpoint(f"{folder}/end.ckpt")
    return seen, weights(module)


def test_checkpoints_hold_the_center_and_load_into_plain_lightning(tmp_path: Any) -> None:
    (seen, final), _ = run_workers(save, str(tmp_path), workers=2)
    for step in (4, 8, 12):
        loaded = Saved.load_from_checkpoint(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_same(weights(loaded), seen[step - 1])
    assert_same(weights(Saved.load_from_checkpoint(tmp_path / "end.ckpt")), final)


@pytest.fixture
def plain(tmp_path: Any) -> Any:
    """A checkpoint without the workers' own states, as other strategies write them."""
    run_workers(save, str(tmp_path), workers=2)
    content = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    del content["lightning_easgd"]
    torch.save(content, tmp_path / "step=12.ckpt")
    # Resumed below without the ModelCheckpoint that made it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        yield tmp_path / "step=12.ckpt"


def resume(rank: int, path: str) -> Any:
    module, strategy, started = Saved(), EASGDStrategy(tau=3), []
    module.on_train_start = lambda: started.append(
        (weights(module), strategy._fit.exchange.clock, module.trainer.global_step)
    )
    fitting = trainer(2, strategy, max_epochs=2, val_check_interval=4)
    fitting.fit(module, loader(rank, 12), loader(rank, 2), ckpt_path=path)
    return started, strategy.telemetry.steps


def test_a_plain_checkpoint_resumes_at_its_weights_and_step(plain: Any) -> None:
    center = weights(Saved.load_from_checkpoint(plain))
    for started, steps in run_workers(resume, str(plain), workers=2):
        assert_same(started[0][0], center)
        assert started[0][2] == 12
        assert steps == 12


def clock_after_resume(rank: int, path: str) -> Any:
    module, strategy, due = Saved(), EASGDStrategy(tau=5), []
    module.on_train_batch_end = lambda *_: due.append(strategy.telemetry.exchanges)
    fitting = trainer(2, strategy, max_epochs=2, val_check_interval=4)
    fitting.fit(module, loader(rank, 12), loader(rank, 2), ckpt_path=path)
    return due


def test_the_clock_goes_on_from_the_global_step(plain: Any) -> None:
    for due in run_workers(clock_after_resume, str(plain), workers=2):
        # Steps 12 to 23; exchanges begin steps 15 and 20.
        assert due == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


class Norm(pl.LightningModule):
    """BatchNorm statistics, an integer buffer, a buffer outside the state dict, frozen and tied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.5)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def differ(self) -> None:
        with torch.no_grad():  # by worker: who is frozen stays, who has no gradient joins
            self.frozen += self.global_rank
            self.unused += self.global_rank
            self.scratch += self.global_rank

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.differ()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.second(self.first(self.norm(batch[0]))).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_norm(rank: int, policy: str) -> Any:
    torch.manual_seed(rank)  # only worker 0's initial weights may count
    module, strategy = Norm(), EASGDStrategy(tau=2, buffers=policy)
    own = {}
    module.on_train_epoch_end = lambda: own.update(arrays(module.state_dict()))
    trainer(2, strategy).fit(module, loader(rank, 5, torch.float32))
    return own, arrays(module.state_dict()), module.scratch.item(), strategy._fit


@pytest.mark.filterwarnings("ignore:'frozen' moved")
@pytest.mark.parametrize("policy", ["average", "broadcast", "local"])
def test_buffers_follow_their_policy(policy: str) -> None:
    results = run_workers(train_norm, policy, workers=2)
    own = [result[0]["norm.running_var"] for result in results]
    assert not np.array_equal(own[0], own[1])
    expected = {
        "average": [(own[0] + own[1]) / 2] * 2,
        "broadcast": [own[0]] * 2,
        "local": own,
    }[policy]
    for rank, (mine, final, scratch, _) in enumerate(results):
        np.testing.assert_allclose(final["norm.running_var"], expected[rank], rtol=1e-6)
        assert final["norm.num_batches_tracked"] == mine["norm.num_batches_tracked"] == 5
        assert scratch == rank


@pytest.mark.filterwarnings("ignore:'frozen' moved")
def test_frozen_tied_and_unused_parameters() -> None:
    results = run_workers(train_norm, "average", workers=2)
    for rank, (_, final, _, exchange) in enumerate(results):
        assert exchange is None
        np.testing.assert_array_equal(final["frozen"], 1.0 + rank)
        np.testing.assert_array_equal(final["first.weight"], results[0][1]["first.weight"])
        np.testing.assert_array_equal(final["first.weight"], final["second.weight"])
        # 1 and 2 at the start; α = .45 at steps 2 and 4 and at the end, no gradient in between.
        center, x = 1.0, np.array([1.0, 2.0])
        for _ in range(3):
            d = 0.45 * (x - center)
            x, center = x - d, center + d.sum()
        np.testing.assert_allclose(final["unused"], center, rtol=1e-6)


class Watched(Norm):
    """Records its float buffers when training starts, and around and inside validation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.running_mean.fill_(1.0)
        self.seen: list[Any] = []

    def look(self, where: str) -> None:
        own = arrays(dict(self.norm.named_buffers()))
        center = arrays(self.trainer.strategy.center_state_dict())
        self.seen.append((where, own["running_var"], center["norm.running_var"]))

    def on_fit_start(self) -> None:
        self.seen.append(("start", self.norm.running_mean.numpy().copy(), None))

    def on_validation_model_zero_grad(self) -> None:
        self.look("before")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("inside")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look("after")


def watch_statistics(rank: int) -> Any:
    module = Watched()
    module.norm.running_mean += rank  # only worker 0's initial buffers may count
    data = loader(rank, 6, torch.float32), loader(rank, 1, torch.float32)
    options = {"val_check_interval": 3, "num_sanity_val_steps": 0}
    trainer(2, EASGDStrategy(tau=2), **options).fit(module, *data)
    return module.seen


@pytest.mark.filterwarnings("ignore:'frozen' moved")
def test_statistics_start_equal_and_are_lent_for_validation() -> None:
    both = run_workers(watch_statistics, workers=2)
    for seen in both:
        assert seen[0][0] == "start"
        np.testing.assert_array_equal(seen[0][1], 1.0)
        # Batches 0, 1, 2, validation, batch 3: the worker's own again, as before validation.
        (_, before, center), (_, inside, _), (where, after, _) = seen[4:7]
        assert where == "after"
        np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(inside, center)
        assert not np.array_equal(inside, before)
    assert not np.array_equal(both[0][4][1], both[1][4][1])
    np.testing.assert_array_equal(both[0][5][1], both[1][5][1])


class Finetuned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.names: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.names.append(self.trainer.strategy._fit.center.main.joined)
        return ((self.head(self.backbone(batch[0])) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def finetune(rank: int, epochs: int, options: dict[str, Any]) -> Any:
    module, strategy = Finetuned(), EASGDStrategy(tau=2, **options)
    start = arrays(module.state_dict())
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    fitting = trainer(2, strategy, max_epochs=epochs, callbacks=[callback])
    fitting.fit(module, loader(rank, 5, torch.float32))
    return start, arrays(module.state_dict()), module.names


@pytest.mark.parametrize("options", [{}, {"final_exchange": False}])
@pytest.mark.parametrize("epochs", [3, 5])
def test_an_unfrozen_backbone_joins_on_all_workers(epochs: int, options: dict[str, Any]) -> None:
    results = run_workers(finetune, epochs, options, workers=2)
    for start, final, joined in results:
        assert_same(final, results[0][1])
        assert not np.array_equal(final["head.weight"], start["head.weight"])
        assert joined[:10] == [1] * 10  # unfrozen before step 10, announced by the exchange there
        if epochs == 5:
            assert joined[13:] == [2] * (len(joined) - 13)
            assert not np.array_equal(final["backbone.weight"], start["backbone.weight"])


class Thawed(Finetuned):
    """The backbone is unfrozen by the fourth batch, in a hook or in the training step itself."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)
        self.inside = inside

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and not self.inside:
            self.backbone.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3 and self.inside:
            self.backbone.requires_grad_(True)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def thaw(rank: int, inside: bool) -> Any:
    module = Thawed(inside=inside)
    trainer(2, EASGDStrategy(tau=2)).fit(module, loader(rank, 9, torch.float32))
    return arrays(module.state_dict())


def test_what_the_training_step_unfreezes_joins_as_what_a_hook_does() -> None:
    hooked, inside = (run_workers(thaw, each, workers=2) for each in (False, True))
    for one, other in zip(hooked, inside, strict=True):
        assert_same(one, other)


def unfreeze_alone(rank: int) -> None:
    module = Finetuned()
    module.backbone.requires_grad_(False)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            module.backbone.requires_grad_(True)

    module.on_train_batch_start = on_train_batch_start
    trainer(2, EASGDStrategy(tau=2)).fit(module, loader(rank, 8, torch.float32))


def test_unfreezing_on_one_worker_only_is_an_error_on_all() -> None:
    outcomes = run_workers(unfreeze_alone, workers=2, check=False)
    assert [outcome.error for outcome in outcomes] == ["ExchangeError"] * 2
    assert all("unfroze parameters that others did not" in o.message for o in outcomes)


class Adversarial(Toy):
    """Two optimizers under manual optimization; one clock counts the steps of both."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False
        self.clocks: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()
        self.clocks.append(self.trainer.strategy._fit.exchange.clock)

    def configure_optimizers(self) -> Any:
        return [SGD([self.w]), SGD([self.b])]


class SharedGraph(Toy):
    """Two losses are computed before the first of two optimizers steps."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        state = self.trainer.strategy.center_state_dict()  # at any time, inside a graph too
        assert state._metadata is not None
        losses = ((x @ self.w - y) ** 2).mean(), ((y * self.b**2) ** 2).mean()
        for loss, optimizer in zip(losses, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD([self.w]), SGD([self.b])]


def train_shared_graph(rank: int) -> Any:
    module = SharedGraph()
    trainer(2, EASGDStrategy(tau=1)).fit(module, loader(rank, 4))
    return weights(module)


def test_a_pull_does_not_break_a_graph_that_waits_for_its_backward() -> None:
    one, two = run_workers(train_shared_graph, workers=2)
    assert_same(one, two)


def train_adversarial(rank: int) -> Any:
    module, strategy = Adversarial(), EASGDStrategy(tau=3)
    trainer(2, strategy).fit(module, loader(rank, 6))
    return weights(module), module.clocks, strategy.telemetry.exchanges


def test_several_optimizers_share_one_clock() -> None:
    results = run_workers(train_adversarial, workers=2)
    for final, clocks, exchanges in results:
        assert_same(final, results[0][0])
        assert clocks == [2, 4, 6, 8, 10, 12]
        assert exchanges == 4  # at steps 3, 6, 9, and the last


def train_with(rank: int, options: dict[str, Any], half: bool) -> Any:
    dtype = torch.bfloat16 if half else torch.float32
    module, seen = Toy(SGD, dtype=torch.float32), []
    strategy = EASGDStrategy(tau=2)
    module.on_train_batch_end = lambda *_: seen.append(
        strategy._fit.center.cohorts[0].fragments[0].center.parts
    )
    trainer(2, strategy, **options).fit(module, loader(rank, 8, dtype))
    return weights(module), module.w.dtype, [part.dtype for part in seen[0]], strategy.telemetry


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"precision": "bf16-true"}, torch.bfloat16),
        ({"precision": "bf16-mixed"}, torch.float32),
        ({"gradient_clip_val": 0.1}, torch.float32),
        ({"accumulate_grad_batches": 2}, torch.float32),
    ],
    ids=str,
)
def test_precisions_clipping_and_accumulation(options: Any, parameters: torch.dtype) -> None:
    half = options.get("precision") == "bf16-true"
    results = run_workers(train_with, options, half, workers=2)
    for final, dtype, center, telemetry in results:
        assert dtype == parameters
        assert center == [torch.float32]
        assert_same(final, results[0][0])
        assert telemetry.steps == 8 // options.get("accumulate_grad_batches", 1)


class UnitSteps(pl.LightningModule):
    """Learning rate 1 and gradient -1, from 0: the vectors of synchronous EASGD."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.states: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.x.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        center = self.trainer.strategy.center_state_dict()["x"]
        self.states.append((self.x[0].item(), center[0].item()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def take_unit_steps(rank: int, workers: int, options: dict[str, Any], steps: int) -> Any:
    module, strategy = UnitSteps(), EASGDStrategy(**options)
    trainer(workers, strategy, max_steps=steps).fit(module, loader(rank, steps + 1))
    return module.states, strategy.telemetry.consensus_distance


@pytest.mark.parametrize(
    ("workers", "options", "expected"),
    [
        (2, {"tau": 1, "alpha": 0.5}, [(1, 0), (1.5, 1), (2.25, 1.5), (2.875, 2.25)]),
        (
            4,
            {"tau": 2, "alpha": 0.225},
            [(1, 0), (2, 0), (2.55, 1.8), (3.55, 1.8), (4.15625, 3.375)],
        ),
    ],
)
def test_vectors_of_unit_steps_through_the_strategy(
    workers: int, options: Any, expected: list[Any]
) -> None:
    options = options | {"final_exchange": False}
    arguments = workers, options, len(expected)
    for states, distance in run_workers(take_unit_steps, *arguments, workers=workers):
        np.testing.assert_allclose(states, expected, rtol=1e-14)
        x, c = expected[-2]  # the last exchange began the last step
        assert distance == pytest.approx((x - c) / c)


def train_alone(rank: int) -> Any:
    module, strategy = Toy(SGD), EASGDStrategy(tau=2)
    trainer(1, strategy).fit(module, loader(rank, 5))
    return strategy.telemetry


def test_one_device_works_and_sends_nothing() -> None:
    (telemetry,) = run_workers(train_alone, workers=1)
    assert (telemetry.exchanges, telemetry.bytes_sent, telemetry.steps) == (3, 0, 5)


def measure(rank: int, folder: str) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    module, strategy = Toy(SGD, dtype=torch.float32), EASGDStrategy(tau=4)
    fitting = trainer(
        4,
        strategy,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=2,
        callbacks=[EASGDMonitor()],
    )
    fitting.fit(module, loader(rank, 9, torch.float32))
    return strategy.telemetry


def test_telemetry_counts_bytes_and_reaches_the_logger(tmp_path: Any) -> None:
    for telemetry in run_workers(measure, str(tmp_path), workers=4):
        ring = 2 * 3 * (8 * 4) // 4  # 8 parameters of 4 bytes, 4 workers
        header = 3 * 8 * 8  # of which each worker sends 3
        assert telemetry.exchanges == 3
        # The last exchange is preceded by a header alone.
        assert telemetry.bytes_sent == telemetry.bytes_received == 3 * (ring + header) + header
        assert telemetry.ddp_bytes_sent == 9 * ring
        assert telemetry.wait_seconds > 0
        assert len(telemetry.worker_wait_seconds) == 4
    header_line, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    for name in ("exchanges", "bytes_sent", "wait_seconds", "consensus_distance", "tau", "alpha"):
        assert f"easgd/{name}" in header_line
    assert len(rows) >= 4


def hold(rank: int) -> Any:
    """α = lr ρ rises past 2/3 with the learning rate."""
    module, strategy, alphas = Toy(SGD), EASGDStrategy(tau=1, rho=5.0), []

    def configure() -> Any:
        optimizer = SGD([module.w, module.b])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module.configure_optimizers = configure
    module.on_train_batch_end = lambda *_: alphas.append(strategy.telemetry.alpha)
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: told.append(str(message)))
        trainer(2, strategy, max_steps=4).fit(module, loader(rank, 4))
    return alphas, [message for message in told if "moving rate" in message]


def test_a_schedule_past_the_stable_edge_is_held_there_and_said_once() -> None:
    results = run_workers(hold, workers=2)
    for alphas, _ in results:
        np.testing.assert_allclose(alphas, [0.0] + 3 * [0.99 * 2 / 3])
    assert len(results[0][1]) == 1
    assert "reached 1, but 2 workers are stable only below" in results[0][1][0]
    assert results[1][1] == []


def find_learning_rate(rank: int, folder: str) -> Any:
    os.chdir(folder)  # the finder leaves a checkpoint where it works
    module, strategy, seen = Toy(SGD), EASGDStrategy(tau=2), []
    module.lr = 0.1

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if not module.trainer._lr_find_suggested_lr_was_used and batch_idx == 0:
            seen.append((weights(module), arrays(strategy.center_state_dict())))

    module.on_train_batch_start = on_train_batch_start
    finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
    fitting = trainer(2, strategy, callbacks=[finder])
    fitting._lr_find_suggested_lr_was_used = False
    fitting.fit(module, loader(rank, 12))
    return seen[-1], weights(module)


def test_the_learning_rate_finder_leaves_center_and_worker_as_they_were(tmp_path: Any) -> None:
    results = run_workers(find_learning_rate, str(tmp_path), workers=2)
    start = initial_weights()
    for (worker, center), final in results:
        assert_same(worker, start)
        assert_same(center, start)
        assert_same(final, results[0][1])


def refuse(rank: int, options: dict[str, Any], case: str) -> None:
    module = Toy(SGD)
    if case == "options" and rank == 1:
        options = options | {"bucket_bytes": 8, "beta": 0.2, "buffers": "local"}
    if case == "shape" and rank == 1:
        module.w = nn.Parameter(torch.zeros(5, 2))
    if case == "name" and rank == 1:
        module.extra = nn.Parameter(torch.zeros(1))
    if case == "frozen":
        module.requires_grad_(False)
    kwargs = {
        "sync_batchnorm": {"sync_batchnorm": True},
        "averaging": {"callbacks": [EMAWeightAveraging()]},
    }.get(case, {})
    trainer(2, EASGDStrategy(**options), **kwargs).fit(module, loader(rank, 3))


@pytest.mark.parametrize(
    ("options", "case", "error", "message"),
    [
        ({"alpha": 0.67}, "", "ValueError", "needs alpha < 2/(workers + 1) = 0.6667"),
        ({"beta": 1.34}, "", "ValueError", "Set beta below 1.333"),
        ({"rho": 7.0}, "", "ValueError", "at learning rate 0.1 for 2 worker(s)"),
        ({}, "shape", "ValueError", 'only worker 1 has "parameter w (5, 2)'),
        ({}, "name", "ValueError", 'only worker 1 has "parameter extra (1,)'),
        ({}, "frozen", "ValueError", "Toy has no parameter with requires_grad=True"),
        ({}, "options", "ValueError", '"beta=0.2", "buffers=local", "bucket_bytes=8"'),
        ({}, "averaging", "MisconfigurationException", "where EASGD delivers the center"),
        ({}, "sync_batchnorm", "MisconfigurationException", "(buffers='average')"),
    ],
)
def test_bad_set_up_is_an_error_on_every_worker(
    options: Any, case: str, error: str, message: str
) -> None:
    for outcome in run_workers(refuse, options, case, workers=2, check=False, timeout=30):
        assert outcome.error == error, outcome.trace
        assert message in outcome.message.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0}, ValueError, "tau=0 is not a communication period"),
        ({"beta": 2.0}, ValueError, "beta=2.0 is not allowed"),
        ({"beta": 0.9, "rho": 1.0}, ValueError, "at most one of beta, alpha and rho"),
        ({"evaluate_on": "mean"}, ValueError, "evaluate_on='mean' .* Allowed: 'center', 'worker'"),
        ({"buffers": "sync"}, ValueError, "Allowed: 'average', 'local', 'broadcast'"),
        ({"elastic_point": "x"}, ValueError, "Allowed: 'iterate', 'parameter'"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes=0 .* a whole number of bytes, at least 1"),
        ({"bucket_bytes": 1.5}, ValueError, "a whole number of bytes"),
        ({"bucket_bytes": float("nan")}, ValueError, "a whole number of bytes"),
        ({"bucket_bytes": "x"}, ValueError, "a whole number of bytes"),
        ({"bucket_bytes": True}, ValueError, "a whole number of bytes"),
        ({"overlap": "yes"}, ValueError, "overlap='yes' is not allowed. Allowed: True, False"),
        ({"final_exchange": None}, ValueError, "final_exchange=None .* Allowed: True, False"),
        ({"strict_resume": 1}, ValueError, "strict_resume=1 .* Allowed: True, False"),
        ({"timeout": 30}, ValueError, "timeout=30 .* Allowed: a positive datetime.timedelta"),
        ({"timeout": timedelta(0)}, ValueError, "Allowed: a positive datetime.timedelta"),
        ({"ddp_comm_hook": print}, TypeError, "never reduce gradients"),
        ({"find_unused_parameters": True}, TypeError, "never reduce gradients"),
        ({"static_graph": True}, TypeError, "Remove the argument"),
        ({"model_averaging_period": 4}, TypeError, "never reduce gradients"),
        ({"mixed_precision": None}, TypeError, "mixed_precision=None, which configures how DDP"),
        ({"tau_min": 2}, TypeError, r"tau_min=2, which there is no more. Write tau=Auto\(min=2\)"),
        ({"tau_max": 8}, TypeError, "tau: {_target_: lightning_easgd.Auto, max: 8}"),
        ({"taw": 4}, TypeError, "unknown argument taw=4. Its own are algorithm, tau, beta"),
    ],
)
def test_bad_arguments_are_refused_at_construction(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        EASGDStrategy(**options)


def test_a_whole_number_of_bytes_may_be_a_float() -> None:
    assert EASGDStrategy(bucket_bytes=1e6).options.bucket_bytes == 1_000_000


def test_the_center_before_fit_is_an_error_that_says_when_there_is_one() -> None:
    with pytest.raises(RuntimeError, match=r"before Trainer.fit\(module\) was called"):
        EASGDStrategy().center_state_dict()


def test_an_accelerator_that_cannot_average_is_refused_at_construction() -> None:
    strategy = EASGDStrategy(parallel_devices=[torch.device("meta")])
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"type .'meta'"):
        strategy._configure_launcher()


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("easgd", "popen"),
        ("easgd_spawn", "spawn"),
        ("easgd_fork", "fork"),
        ("easgd_notebook", "fork"),
    ],
)
def test_strategies_are_registered_by_name(name: str, start: str) -> None:
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, EASGDStrategy)
    assert strategy._start_method == start
    assert isinstance(trainer(2, name).strategy, EASGDStrategy)
