"""Trainer(strategy="easgd_async"): workers of one machine that meet at the end only."""

from __future__ import annotations

import os
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from processes import run_workers
from torch.utils.data import DataLoader
from toy import Batches, Toy, initial_weights, loader, trainer, weights
from waiting import until

from lightning_easgd import CenterAt, EASGDMonitor, EASGDStrategy
from lightning_easgd.strategy import local_server
from lightning_easgd.strategy.options import Options

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(170)]

SGD = partial(torch.optim.SGD, lr=0.05)
WORKERS = 3


class Counting(Toy):
    """Notes which batches it sees."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.trained: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.training:
            self.trained.append(float(batch[0].sum()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(float(batch[0].sum()))
        self.log("val_loss", super().training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", super().training_step(batch, batch_idx))


def numbered(count: int) -> DataLoader:
    return DataLoader(Batches(0, count), batch_size=None)


def fit_together(rank: int, folder: Path) -> dict[str, Any]:
    module = Counting()
    saved = ModelCheckpoint(folder, monitor="val_loss", save_last=True)
    fitting = trainer(
        WORKERS,
        "easgd_async",
        max_epochs=2,
        use_distributed_sampler=True,
        enable_checkpointing=True,
        callbacks=[saved, EASGDMonitor(), EarlyStopping("val_loss", patience=9)],
    )
    fitting.fit(module, numbered(12 * WORKERS), numbered(5))
    (tested,) = fitting.test(module, numbered(5), verbose=False)
    telemetry = fitting.strategy.telemetry
    return {
        "weights": weights(module),
        "trained": module.trained,
        "validated": module.validated,
        "tested": tested["test_loss"],
        "steps": fitting.global_step,
        "added": telemetry.differences_added,
        "alpha": telemetry.alpha,
        "grouped": torch.distributed.is_initialized(),
        "stopping": [type(each) for each in fitting.callbacks].count(EarlyStopping),
    }


def test_workers_share_the_data_out_and_deliver_one_center(tmp_path: Path) -> None:
    found = run_workers(fit_together, tmp_path, workers=WORKERS, timeout=150)
    for rank, worker in enumerate(found):
        assert worker["steps"] == 24
        assert worker["added"] == 3  # at 10 and 20, and the last
        assert worker["alpha"] == pytest.approx(0.9 / WORKERS)
        assert not worker["grouped"]
        assert worker["stopping"] == 1
        assert worker["tested"] == found[0]["tested"]
        np.testing.assert_array_equal(worker["weights"]["w"], found[0]["weights"]["w"])
        assert len(set(worker["validated"])) == (0 if rank else 5)  # all of it, by worker 0
    first = [set(worker["trained"][:12]) for worker in found]
    assert len(set.union(*first)) == 36
    assert os.path.exists(tmp_path / "last.ckpt")
    assert not np.array_equal(found[0]["weights"]["w"], initial_weights()["w"])


def fit_and_die(rank: int) -> Any:
    module = Toy(SGD)
    if rank == 1:
        module.on_train_batch_end = lambda *args: (
            os.kill(os.getpid(), signal.SIGKILL) if args[2] == 7 else None
        )
    strategy = EASGDStrategy(center=CenterAt("local", lease=3.0), tau=2)
    fitting = trainer(WORKERS, strategy)
    fitting.fit(module, loader(rank, 20 + 10 * rank))
    return weights(module), fitting.global_step


@pytest.mark.usefixtures("forked_server")
def test_a_worker_that_is_killed_is_not_noticed_by_the_others() -> None:
    outcomes = run_workers(fit_and_die, workers=WORKERS, timeout=150, check=False)
    assert "killed" in f"{outcomes[1].message}"
    (first, steps), (last, more) = outcomes[0].value, outcomes[2].value
    assert (steps, more) == (20, 40)
    np.testing.assert_array_equal(first["w"], last["w"])


class Stops(EarlyStopping):
    """At the first validation."""

    def __init__(self) -> None:
        super().__init__("val_loss", patience=0, mode="max", min_delta=100.0)


def stop_early(rank: int) -> tuple[int, Any]:
    module = Counting()
    strategy = EASGDStrategy(center="local", tau=2)
    fitting = trainer(2, strategy, max_epochs=100_000, callbacks=[Stops()])
    fitting.fit(module, loader(rank, 12), loader(9, 1))
    return fitting.current_epoch, weights(module)


@pytest.mark.usefixtures("forked_server")
def test_worker_0_stops_all_early() -> None:
    (first, center), (last, same) = run_workers(stop_early, workers=2, timeout=150)
    assert first <= 3
    assert last < 100_000
    np.testing.assert_array_equal(center["w"], same["w"])


def resume(rank: int, folder: Path) -> Any:
    steps = []
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists")
    for path in (None, folder / "last.ckpt"):
        module = Counting()
        saved = ModelCheckpoint(folder, save_last=True, every_n_train_steps=4)
        fitting = trainer(
            2,
            EASGDStrategy(center="local", tau=2),
            max_steps=8 if path is None else 12,
            max_epochs=-1,
            callbacks=[saved],
            enable_checkpointing=True,
        )
        module.on_train_start = lambda fitting=fitting: steps.append(fitting.global_step)
        fitting.fit(module, loader(rank, 12), ckpt_path=path)
    return steps, weights(module)


def test_a_job_resumes_from_what_worker_0_saved(tmp_path: Path) -> None:
    found = run_workers(resume, tmp_path, workers=2, timeout=150)
    assert found[0][0] == [0, 8]
    np.testing.assert_array_equal(found[0][1]["w"], found[1][1]["w"])


def fail_before_joining(rank: int, told: Path) -> tuple[str, bool]:
    """What this worker is told, and whether a server that it started is left."""
    module = Toy(SGD)
    if rank == 0:
        module.on_train_start = partial(fail_when_told, told)
    else:
        module.on_train_batch_start = lambda *_: told.touch()
    strategy = EASGDStrategy(
        center=CenterAt("local", max_offline_rounds=0), tau=2, exchange_timeout=20
    )
    try:
        trainer(2, strategy, max_epochs=-1, max_time={"seconds": 100}).fit(module, loader(rank, 40))
    except Exception as error:
        return f"{type(error).__name__}: {error}", bool(local_server._running)
    return "nothing", bool(local_server._running)


def fail_when_told(told: Path) -> None:
    until(told.exists, 60)
    raise RuntimeError("a mistake of the user")


@pytest.mark.usefixtures("forked_server")
def test_without_worker_0_the_others_end_with_an_error_that_names_it(tmp_path: Path) -> None:
    """It stays alive after its error, and is no reason for its server to stay."""
    told = tmp_path / "told"
    (first, left), (other, _) = run_workers(fail_before_joining, told, workers=2, timeout=100)
    assert first == "RuntimeError: a mistake of the user"
    assert not left
    assert "No server answered within 20 s" in other
    assert "which worker 0 started (look for its error first)" in other


def fail_to_join(rank: int) -> bool:
    fitting = trainer(1, EASGDStrategy(center="local"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "at_server", contradict)
        with pytest.raises(ValueError, match="contradicts"):
            fitting.fit(Toy(SGD), loader(0, 5))
    return bool(local_server._running)


def contradict(*_: Any) -> None:
    raise ValueError("it contradicts the server")


@pytest.mark.usefixtures("forked_server")
def test_a_server_ends_with_the_worker_that_cannot_join_it() -> None:
    assert run_workers(fail_to_join, workers=1) == [False]
