"""Exchanges through a codec: equal centers, nothing lost, resumed bit for bit."""

from __future__ import annotations

import copy
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import reference
import torch
from against_reference import LR, reference_optimizers
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import Workers
from staying import run_in_turn, run_workers
from torch import nn
from toy import Resumable, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy, Int8, TopK
from lightning_easgd.communication import CompressedAllReduce, Level

SGD = partial(torch.optim.SGD, lr=LR)
CODECS = ["bf16", "fp16", "int8", TopK(0.3)]


def fit(rank: int, workers: int, options: dict[str, Any]) -> Any:
    module = Toy(SGD, dtype=torch.float32)
    strategy = EASGDStrategy(tau=3, **options)
    trainer(workers, strategy).fit(module, loader(rank, 24, torch.float32))
    return weights(module), strategy.telemetry.bytes_sent


@pytest.mark.parametrize(("codec", "within"), [("bf16", 1e-3), ("fp16", 1e-4), ("int8", 2e-3)])
def test_the_center_is_the_papers_within_what_is_rounded(codec: str, within: float) -> None:
    results = run_workers(fit, 3, {"compression": codec, "final_exchange": False}, workers=3)
    center, _ = reference.easgd(
        initial_weights(),
        [batches(rank, 24) for rank in range(3)],
        reference_optimizers("sgd", lambda name, t: LR, 3),
        tau=3,
        alpha=lambda name, t: 0.3,
    )
    for got, _ in results:
        for key, value in got.items():
            np.testing.assert_array_equal(value, results[0][0][key])
            np.testing.assert_allclose(value, center[key], atol=within)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_overlap_changes_no_bit(codec: Any) -> None:
    options = [{"overlap": True}, {"overlap": False}, {"overlap": True, "final_exchange": False}]
    cases = [(2, {"compression": codec, **more}) for more in options]
    one, two, other = (run[0][0] for run in run_in_turn(fit, cases, workers=2))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not all(np.array_equal(one[key], other[key]) for key in one)


class Apart(Toy):
    """Workers that start apart and have nothing to learn: only the springs move them."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.0))
        self.more = torch.nn.Parameter(torch.zeros(700, dtype=torch.float64))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(list(self.parameters()))

    def part(self) -> None:
        torch.manual_seed(self.global_rank)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += torch.randn_like(parameter)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.more.sum()


def drift(rank: int, codec: Any, bucket_bytes: int, fragments: int, final: bool) -> Any:
    """This worker's part of what must not change, before each batch and after training."""
    module, seen, held = Apart(), [], 0.0
    options = {"bucket_bytes": bucket_bytes, "fragments": fragments, "final_exchange": final}
    strategy = EASGDStrategy(tau=2, compression=codec, **options)

    def note(batch: Any, batch_idx: int) -> None:
        nonlocal held
        center = strategy.center_state_dict()
        own = sum(p.detach().sum().item() for p in module.parameters())
        accounts = strategy._fit.exchange._link.all_reduce.state()["accounts"]
        pieces = [
            t for a in accounts.values() for t in [a["residual"], *a["owners"]] if t is not None
        ]
        held = sum(float(piece.sum()) for piece in pieces)
        seen.append((own, sum(float(center[name].sum()) for name in center), held))

    def note_last(outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            module.part()
        elif batch_idx == 12:
            note(batch, batch_idx)

    module.on_train_batch_start, module.on_train_batch_end = note, note_last
    trainer(3, strategy).fit(module, loader(rank, 13))
    return seen, sum(v.sum() for v in weights(module).values())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_nothing_is_lost(codec: Any) -> None:
    ways = [(25 * 2**20, 1), (2000, 1), (2000, 2)]
    cases = [(codec, *way, final) for way in ways for final in (True, False)]
    for case, results in zip(cases, run_in_turn(drift, cases, workers=3), strict=True):
        require_nothing_lost(results, codec, fragments=case[2], final=case[3])


def require_nothing_lost(results: Any, codec: Any, *, fragments: int, final: bool) -> None:
    steps = list(zip(*(seen for seen, _ in results), strict=True))
    totals = [sum(own + held for own, _, held in step) + step[0][1] for step in steps[1:]]
    np.testing.assert_allclose(totals, totals[0], atol=1e-9)
    assert any(held for seen, _ in results for *_, held in seen)
    owns, (center, *_), helds = zip(*steps[-1], strict=True)
    if isinstance(codec, TopK):  # workers take back what they held
        moved = 0.3 * (sum(owns) + sum(helds) - 3 * center) if final else 0.0
    else:
        moved = 0.3 * (sum(owns) - 3 * center) * final + sum(helds)
    if fragments == 1 or not final:
        assert results[0][1] - center == pytest.approx(moved, abs=1e-9)


def flat(state: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([state[name].ravel() for name in ("w", "b")])


def reckoning(codec: TopK, workers: int, steps: int, tau: int, final: bool) -> np.ndarray:
    """Synchronous EASGD whose workers hold back all but the largest of what they lost."""
    alpha, gamma, center = 0.9 / workers, workers / 2, flat(initial_weights())
    own, held = [center.copy() for _ in range(workers)], [0 * center for _ in range(workers)]
    sent = math.ceil(codec.fraction * len(center))

    def gradient(x: np.ndarray, batch: Any) -> np.ndarray:
        return flat(reference.toy_gradient({"w": x[:6].reshape(3, 2), "b": x[6:]}, batch))

    data = [batches(rank, steps) for rank in range(workers)]
    for t in range(steps):
        pulls, total = [0.0] * workers, 0 * center
        if t and t % tau == 0:
            for i in range(workers):
                pulls[i] = alpha * (own[i] - center - gamma * held[i])
                held[i] = held[i] + pulls[i]
                places = np.argsort(-np.abs(held[i]))[:sent]
                message = 0 * center
                message[places] = held[i][places].astype(np.float32)
                held[i], total = held[i] - message, total + message
        own = [x - LR * gradient(x, data[i][t]) - pulls[i] for i, x in enumerate(own)]
        center = center + total
    if final:
        center = center + alpha * sum(x + e - center for x, e in zip(own, held, strict=True))
    return center


def fit_in_double(rank: int, workers: int, options: dict[str, Any]) -> Any:
    module = Toy(SGD)
    trainer(workers, EASGDStrategy(**options)).fit(module, loader(rank, 24))
    return weights(module)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(("workers", "tau", "fraction"), [(2, 1, 0.1), (3, 2, 0.3), (4, 3, 0.1)])
def test_workers_reckon_with_what_they_hold_back(
    workers: int, tau: int, fraction: float, final: bool
) -> None:
    codec = TopK(fraction)
    options = {"tau": tau, "compression": codec, "final_exchange": final}
    for got in run_workers(fit_in_double, workers, options, workers=workers):
        expected = reckoning(codec, workers, 24, tau, final)
        np.testing.assert_allclose(flat(got), expected, rtol=0, atol=1e-12)


class Regression(pl.LightningModule):
    """Some thousand weights, of which workers with different data send one in a hundred."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        torch.manual_seed(1 + rank)
        inputs = torch.randn(400, 32)
        self.data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True) + rank)
        self.before: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return ((self.layers(batch[0]) - batch[1]) ** 2).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 300:
            self.before.append(self.loss(self.trainer.strategy.center_state_dict()))

    def loss(self, state: dict[str, torch.Tensor]) -> float:
        layers = copy.deepcopy(self.layers)
        layers.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
        with torch.no_grad():
            return float(((layers(self.data.tensors[0]) - self.data.tensors[1]) ** 2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


def regression(rank: int, options: dict[str, Any]) -> list[float]:
    module = Regression(rank)
    fitting = trainer(3, EASGDStrategy(**options), max_epochs=-1, max_steps=300)
    fitting.fit(module, torch.utils.data.DataLoader(module.data, batch_size=8))
    return [module.before[0], module.loss(module.state_dict())]


@pytest.mark.parametrize("tau", [1, 4])
def test_the_last_exchange_delivers_the_center_that_was_validated(tau: int) -> None:
    _, best = np.mean(run_workers(regression, {"tau": tau}, workers=3), axis=0)
    options = {"tau": tau, "compression": "topk"}
    before, delivered = np.mean(run_workers(regression, options, workers=3), axis=0)
    assert delivered == pytest.approx(before, rel=0.1)
    assert delivered < 1.25 * best


class Thinned(Int8):
    """An owner of a part of the sum passes every tenth value on, and keeps the rest."""

    block = 10

    def wire_bytes(self, numel: int) -> int:
        return 4 * (numel // 10)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        sent = torch.empty(values.numel() // 10)
        return sent.copy_(values.view(-1, 10)[:, 0]).view(torch.uint8)

    def decode(self, wire: torch.Tensor, numel: int, dtype: torch.dtype) -> torch.Tensor:
        values = torch.zeros(numel // 10, 10, dtype=dtype)
        values[:, 0] = wire.view(torch.float32)
        return values.view(-1)


def refused(rank: int, options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="which diverges") as found:
        trainer(2, EASGDStrategy(tau=2, **options)).fit(Toy(SGD), loader(rank, 4))
    return str(found.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "sma", "compression": "topk"}, "= 0.09091, since the codec holds much back"),
        ({"compression": Thinned()}, "the center gets a value only every 1"),
    ],
    ids=str,
)
def test_what_leaves_the_stable_range_is_refused(options: Any, said: str) -> None:
    for message in run_workers(refused, options, workers=2):
        assert said in message
        assert "Set beta below" in message


def elastic_with(rank: int, options: dict[str, Any]) -> Any:
    module = Toy(SGD)
    trainer(2, EASGDStrategy(tau=2, **options)).fit(module, loader(rank, 12))
    return weights(module)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "sma", "compression": TopK(0.1), "beta": 0.15},
        {"algorithm": "sma", "compression": "int8"},
        {"compression": Thinned(), "beta": 0.1},
    ],
    ids=str,
)
def test_what_stays_in_it_trains(options: Any) -> None:
    one, two = run_workers(elastic_with, options, workers=2)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def resumable(rank: int, codec: Any, folder: Path, resume: Path | None) -> Any:
    module = Toy(partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True))
    fitting = trainer(
        2,
        EASGDStrategy(tau=2, compression=codec),
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        ],
    )
    fitting.fit(module, Resumable(rank, 6), ckpt_path=resume)
    return {name: value.tobytes() for name, value in weights(module).items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_resuming_with_something_held_back_goes_on_bit_for_bit(codec: Any, tmp_path: Path) -> None:
    straight = run_workers(resumable, codec, tmp_path, None, workers=2)
    assert run_workers(resumable, codec, tmp_path, tmp_path / "step=5.ckpt", workers=2) == straight


def test_what_is_held_back_survives_a_checkpoint_before_the_first_exchange() -> None:
    class Alone:
        rank, size = 0, 1

    level = Level(0, 1, None)
    saved = CompressedAllReduce(Alone(), 2**20, Int8(), level=level)
    saved._accounts_of({"w": torch.ones(3)})[0].residual.fill_(0.5)
    resumed = CompressedAllReduce(Alone(), 2**20, Int8(), level=level)
    resumed.load_state(saved.state())
    account = resumed.state()["accounts"]["w"]
    assert account["residual"].tolist() == [0.5] * 3


def thawing(rank: int, codec: Any) -> Any:
    module = Toy(SGD, dtype=torch.float32)
    module.b.requires_grad_(False)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        module.b.requires_grad_(batch_idx >= 5)

    module.on_train_batch_start = on_train_batch_start
    trainer(2, EASGDStrategy(tau=2, compression=codec)).fit(module, loader(rank, 16, torch.float32))
    return weights(module)


@pytest.mark.parametrize("codec", [None, *CODECS], ids=str)
def test_parameters_that_join_later(codec: Any) -> None:
    one, two = run_workers(thawing, codec, workers=2)
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not np.array_equal(one["b"], initial_weights()["b"].astype(np.float32))


def poisoned(rank: int, codec: Any) -> Any:
    module, strategy = Toy(SGD, dtype=torch.float32), EASGDStrategy(tau=2, compression=codec)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            with torch.no_grad():
                module.w[0, 0] = float("inf")

    module.on_train_batch_start = on_train_batch_start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        trainer(2, strategy).fit(module, loader(rank, 12, torch.float32))
    return weights(module), strategy.telemetry.non_finite


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_poisoned_worker_is_left_out(codec: Any) -> None:
    for got, count in run_workers(poisoned, codec, workers=2):
        assert count == 1
        assert all(np.isfinite(value).all() for value in got.values())


def uneven(rank: int, codec: Any) -> Any:
    module = Toy(SGD, dtype=torch.float32)
    fitting = trainer(2, EASGDStrategy(tau=2, compression=codec), max_epochs=2)
    fitting.fit(module, loader(rank, [5, 12][rank], torch.float32))
    return weights(module), fitting.global_step


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_workers_with_different_numbers_of_batches(codec: Any) -> None:
    (one, first), (two, second) = run_workers(uneven, codec, workers=2)
    assert (first, second) == (10, 24)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def killed(rank: int) -> None:
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    module.on_train_batch_start = on_train_batch_start
    strategy = EASGDStrategy(tau=2, compression="int8", exchange_timeout=2)
    trainer(2, strategy).fit(module, loader(rank, 12))


def test_a_worker_that_is_killed_ends_the_others_with_its_name() -> None:
    with Workers(killed, workers=2) as group:
        (outcome,) = group.collect(40, without=1)
    assert outcome.error == "ExchangeError"
    assert "Worker 1 " in outcome.message


def traffic(rank: int, workers: int, codec: Any) -> Any:
    module = Apart()
    module.float()
    strategy = EASGDStrategy(tau=1, compression=codec, final_exchange=False)
    module.more = torch.nn.Parameter(torch.zeros(100_000))
    trainer(workers, strategy).fit(module, loader(rank, 2, torch.float32))
    return strategy.telemetry.bytes_sent


def test_a_quarter_of_the_bytes_however_many_workers() -> None:
    for workers in (2, 4):
        full, short = (
            run_workers(traffic, workers, codec, workers=workers)[0] for codec in (None, Int8())
        )
        # One exchange each, and what int8 held back goes uncompressed at the end.
        assert (short - full) / full == pytest.approx(0.25, abs=0.02)
