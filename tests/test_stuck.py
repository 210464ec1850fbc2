"""Workers that are alive and stuck, stopped for a while, or killed while what they forked lives."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import signs_of_life_come_often
from processes import Workers, run_workers
from torch.utils.data import DataLoader
from toy import Batches, Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import ExchangeError, leave_all_groups

SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = 24


def at_step(module: Toy, step: int, what: Any) -> None:
    """Have a worker do ``what`` before the batch after ``step`` steps."""

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx == step:
            what()

    module.on_train_batch_start = on_train_batch_start


def stuck(rank: int, place: str, counts: list[int]) -> None:
    """Worker 1 sleeps for ever, somewhere."""
    module, sleep = Toy(SGD), partial(time.sleep, 1000)
    data = loader(rank, counts[rank])
    if place == "fit end":
        module.on_train_epoch_end = sleep if rank == 1 else (lambda: None)
    elif rank == 1:
        at_step(module, int(place), sleep)
    trainer(len(counts), EASGDStrategy(tau=4, exchange_timeout=2)).fit(module, data)


@pytest.mark.parametrize(
    ("place", "counts", "said"),
    [
        ("10", [24, 24, 24], "at step 10 (.between two batches"),
        ("22", [24, 24, 24], "at step 22 (.between two batches"),  # after the last exchange
        ("22", [5, 24, 7], "at step 22 (.between two batches"),  # others have no batch left
        ("fit end", [24, 24, 24], "at step 24 (.at epoch end"),
    ],
)
def test_who_is_alive_and_stuck_is_named(
    place: str, counts: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs_of_life_come_often(monkeypatch)
    with Workers(stuck, place, counts, workers=3) as group:
        outcomes = group.collect(40, without=1)
    for outcome in outcomes:
        assert outcome.error == "ExchangeError", outcome
        before, _, after = said.partition(".")
        assert f"Worker 1 is alive but has stood {before}" in outcome.message
        assert after in outcome.message


def validating(rank: int, seconds: float) -> int:
    """Worker 1 validates for longer than the timeout, batch after batch; the other does not."""
    module = Toy(SGD)
    module.validation_step = lambda batch, batch_idx: time.sleep(seconds if rank == 1 else 0)
    fitting = trainer(2, EASGDStrategy(tau=4, exchange_timeout=2), num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, STEPS), loader(rank, 6))
    return fitting.global_step


def test_who_gets_on_in_validation_is_waited_for_at_the_end() -> None:
    assert run_workers(validating, 0.8, workers=2) == [STEPS] * 2


def stalled(rank: int, seconds: float) -> int:
    """Worker 1 is stopped for a while; worker 0 has no batch left and is idle."""
    module, counts = Toy(SGD), [5, 16]

    def stop() -> None:
        waker = ["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]
        subprocess.Popen(waker)
        os.kill(os.getpid(), signal.SIGSTOP)

    if rank == 1:
        at_step(module, 10, stop)
    fitting = trainer(2, EASGDStrategy(tau=4, exchange_timeout=7))
    fitting.fit(module, loader(rank, counts[rank]))
    return fitting.global_step


def test_a_stall_that_is_shorter_than_the_timeout_is_survived_by_an_idle_worker() -> None:
    assert run_workers(stalled, 5.0, workers=2) == [5, 16]


def waiter_stalled(rank: int) -> int:
    """Worker 0 is stopped while it waits for worker 1, and for longer than the timeout."""
    module = Toy(SGD)

    def be_stopped() -> None:
        waker = f"sleep 1; kill -STOP {os.getpid()}; sleep 3; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", waker])

    at_step(module, 8, partial(time.sleep, 1.8) if rank == 1 else be_stopped)
    fitting = trainer(2, EASGDStrategy(tau=4, exchange_timeout=2))
    fitting.fit(module, loader(rank, STEPS))
    return fitting.global_step


def test_who_was_stopped_itself_does_not_blame_others() -> None:
    with Workers(waiter_stalled, workers=2) as group:
        ended = group.collect(40)
    assert [outcome.value for outcome in ended] == [STEPS] * 2, ended


class Slow(Batches):
    """What a data loader's process sleeps in when its worker is long dead."""

    def __getitem__(self, index: int) -> Any:
        if index >= 16:
            time.sleep(20)
        return super().__getitem__(index)


def killed_with_loaders(rank: int, who: int) -> None:
    """Worker ``who`` is killed, and the other notices."""
    torch.multiprocessing.current_process().daemon = False  # may start processes
    module = Toy(SGD)
    data = loader(rank, STEPS)
    if rank == who:
        data = DataLoader(Slow(rank, STEPS), batch_size=None, num_workers=2)
        at_step(module, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ExchangeError, match=rf"Worker {who} gave no sign of life any more: its"):
        trainer(2, EASGDStrategy(tau=4)).fit(module, data)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell")
@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_worker_whose_loader_processes_live_is_noticed_at_once(who: int) -> None:
    with Workers(killed_with_loaders, who, workers=2) as group:
        (outcome,) = group.collect(15, without=who)  # its loaders sleep longer
    assert outcome.error is None, outcome


def reason(rank: int) -> None:
    """Worker 0 raises while worker 1 is in a long round; it ends at once, with the store."""
    module = Toy(SGD)

    def fail() -> None:
        raise LookupError("no such picture")

    at_step(module, 6, fail if rank == 0 else partial(time.sleep, 3))
    trainer(2, EASGDStrategy(tau=4, exchange_timeout=5)).fit(module, loader(rank, STEPS))


def test_why_worker_0_failed_is_told_before_its_store_goes() -> None:
    outcomes = run_workers(reason, workers=2, check=False)
    assert outcomes[0].error == "LookupError"
    assert outcomes[1].error == "ExchangeError"
    assert "Worker 0 ended with" in outcomes[1].message
    assert "LookupError: no such picture" in outcomes[1].message


def left_behind(rank: int, options: dict[str, Any]) -> list[str]:
    """Threads that are left when a worker leaves all groups; its trainer lives on."""
    gc.disable()  # by chance it collects nothing before
    fitting = trainer(4, EASGDStrategy(tau=4, **options))
    fitting.fit(Toy(SGD), loader(rank, STEPS))
    leave_all_groups()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return names + [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell")
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"compression": "int8"}], ids=str)
def test_no_thread_of_a_fit_is_left_when_the_interpreter_ends(options: dict[str, Any]) -> None:
    for names in run_workers(left_behind, options, workers=4):
        assert not any("gloo" in name or "easgd" in name for name in names), names
