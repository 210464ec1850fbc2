"""Workers with different numbers of batches: who is done shadows the exchanges of the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import LR, OPTIMIZERS, reference_optimizers, strength
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from torch.utils.data import DataLoader, IterableDataset
from toy import Batches, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy

COUNTS = [10, 14, 5]
WORKERS = len(COUNTS)
SGD = OPTIMIZERS["sgd"]


class Stream(IterableDataset):
    """The batches of a worker, without a length."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def __iter__(self) -> Iterator[Any]:
        return iter(Batches(self.rank, self.count))


def stream(rank: int, count: int) -> DataLoader:
    return DataLoader(Stream(rank, count), batch_size=None)


def expected(name: str, epochs: int, **options: Any) -> reference.State:
    every_row = {"tau": 4, "alpha": lambda name, t: 0.9 / WORKERS}
    longest = max(COUNTS)
    by_worker = [
        epochs * (batches(rank, count) + (longest - count) * [None])
        for rank, count in enumerate(COUNTS)
    ]
    center, _ = reference.easgd(
        initial_weights(),
        by_worker,
        reference_optimizers(name, lambda name, t: LR, WORKERS),
        **every_row | options,
    )
    return center


def fit(
    rank: int,
    name: str,
    make_loader: Any,
    final: bool,
    options: dict[str, Any],
    fragments: int = 1,
) -> Any:
    module = Toy(OPTIMIZERS[name])
    strategy = EASGDStrategy(tau=4, fragments=fragments, final_exchange=final)
    fitting = trainer(WORKERS, strategy, **options)
    fitting.fit(module, make_loader(rank, COUNTS[rank]))
    return weights(module), fitting.global_step, strategy.telemetry.exchanges


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_worker_that_is_done_is_one_whose_gradients_are_zero(name: str, final: bool) -> None:
    results = run_workers(fit, name, loader, final, {}, workers=WORKERS)
    assert [(steps, exchanges) for _, steps, exchanges in results] == [
        (count, 3 + final) for count in COUNTS
    ]
    center = expected(name, 1, final_exchange=final)
    for got, *_ in results:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


def test_who_is_done_takes_turns_with_fragments_too() -> None:
    results = run_workers(fit, "nesterov", loader, False, {}, 2, workers=WORKERS)
    center = expected("nesterov", 1, tau=2, alpha=strength(WORKERS, 2, 2))
    for got, *_ in results:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make_loader", [loader, stream])
def test_all_begin_the_next_epoch_together(make_loader: Any) -> None:
    results = run_workers(fit, "sgd", make_loader, True, {"max_epochs": 3}, workers=WORKERS)
    center = expected("sgd", 3, final_exchange=True)
    assert [steps for _, steps, _ in results] == [3 * count for count in COUNTS]
    for got, *_ in results:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


class Validated(Toy):
    """Reduces a metric over the workers in every validation and at the end of every epoch."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.validated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("size", self.w.norm(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.trainer.callback_metrics["size"]))


def validated(rank: int, options: dict[str, Any]) -> Any:
    module = Validated()
    fitting = trainer(WORKERS, EASGDStrategy(tau=4), max_epochs=2, **options)
    fitting.fit(module, stream(rank, COUNTS[rank]), loader(0, 2))
    return module.validated, float(fitting.callback_metrics["batches"]), weights(module)


def test_validation_and_epoch_metrics_wait_for_the_slowest() -> None:
    results = run_workers(validated, {"num_sanity_val_steps": 0}, workers=WORKERS)
    for sizes, count, _ in results:
        assert sizes == results[0][0]
        assert len(sizes) == 2
        assert count == sum(COUNTS)


def test_a_validation_that_not_all_begin_is_an_error_on_all() -> None:
    options = {"num_sanity_val_steps": 0, "val_check_interval": 4}
    outcomes = run_workers(validated, options, workers=WORKERS, check=False, timeout=30)
    assert [o.error for o in outcomes] == ["ExchangeError"] * WORKERS
    assert "worker 0: validation; worker 1: validation; worker 2: epoch end" in outcomes[0].message


def checkpointed(rank: int, folder: Path, counts: list[int], options: dict[str, Any]) -> int:
    saving = {"enable_checkpointing": True, "default_root_dir": folder}
    fitting = trainer(2, EASGDStrategy(tau=4), **saving, **options)
    fitting.fit(Toy(SGD), stream(rank, counts[rank]))
    return fitting.global_step


def test_lightnings_default_checkpoint_has_worker_0s_name(tmp_path: Path) -> None:
    assert run_workers(checkpointed, tmp_path, [5, 9], {}, workers=2) == [5, 9]
    assert (tmp_path / "checkpoints" / "epoch=0-step=5.ckpt").exists()


@pytest.mark.parametrize(
    ("counts", "options", "places"),
    [
        ([10, 6], {"max_epochs": -1, "max_steps": 20}, "worker 0: fit end; worker 1: collective"),
        ([0, 9], {"max_epochs": 2}, "worker 0: epoch end; worker 1: collective"),
    ],
)
def test_a_checkpoint_that_not_all_save_is_an_error_on_all(
    counts: list[int], options: dict[str, Any], places: str, tmp_path: Path
) -> None:
    arguments = tmp_path, counts, options
    outcomes = run_workers(checkpointed, *arguments, workers=2, check=False, timeout=30)
    assert [o.error for o in outcomes] == ["ExchangeError"] * 2
    assert all(places in o.message for o in outcomes)


def slow(rank: int) -> int:
    """Worker 1 has a round that takes longer than the timeout, while worker 0 is idle."""
    module = Toy(SGD)
    if rank == 1:
        module.on_train_batch_start = lambda batch, batch_idx: time.sleep(0.7)
    fitting = trainer(2, EASGDStrategy(tau=8, exchange_timeout=2))
    fitting.fit(module, loader(rank, [3, 9][rank]))
    return fitting.global_step


def test_an_idle_worker_waits_as_long_as_another_gets_on() -> None:
    assert run_workers(slow, workers=2, timeout=40) == [3, 9]


class Thawing(Toy):
    """Unfreezes a parameter when its second epoch begins."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.more = torch.nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + (self.more**2).sum()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())

    def on_train_epoch_start(self) -> None:
        self.more.requires_grad_(self.current_epoch > 0)


def thaw(rank: int) -> Any:
    module = Thawing()
    trainer(2, EASGDStrategy(tau=4), max_epochs=3).fit(module, stream(rank, 9 * rank))
    return weights(module)["more"].tolist()


def test_parameters_join_on_a_worker_that_has_no_batch() -> None:
    one, two = run_workers(thaw, workers=2)
    assert one == two != [1.0, 1.0]


def resumed(rank: int, folder: Path, path: str | None) -> Any:
    module = Toy(OPTIMIZERS["nesterov"])
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 3, "callbacks": [saving], "enable_checkpointing": True}
    fitting = trainer(WORKERS, EASGDStrategy(tau=4), **options)
    fitting.fit(module, loader(rank, COUNTS[rank]), ckpt_path=path)
    return {name: value.tobytes() for name, value in weights(module).items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resuming_at_an_epoch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = run_workers(resumed, tmp_path, None, workers=WORKERS)
    again = run_workers(resumed, tmp_path, str(tmp_path / "epoch=0.ckpt"), workers=WORKERS)
    assert again == straight


def empty_for_one(rank: int) -> Any:
    module = Toy(SGD)
    fitting = trainer(2, EASGDStrategy(tau=4), max_epochs=2)
    fitting.fit(module, stream(rank, 8 * rank))
    return weights(module), fitting.global_step


def test_a_worker_whose_stream_is_empty_is_pulled_along() -> None:
    results = run_workers(empty_for_one, workers=2, timeout=40)
    assert [steps for _, steps in results] == [0, 16]
    center, _ = reference.easgd(
        initial_weights(),
        [16 * [None], 2 * batches(1, 8)],
        reference_optimizers("sgd", lambda name, t: LR, 2),
        tau=4,
        alpha=lambda name, t: 0.45,
        final_exchange=True,
    )
    for got, _ in results:
        np.testing.assert_allclose(got["w"], center["w"], rtol=1e-9, atol=1e-11)
