"""Workers that raise, are killed or stop answering: the others end, and say who is missing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from interrupted import signs_of_life_come_often
from processes import Forked, Workers, free_port, run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = 24


@pytest.fixture(autouse=True)
def _signs_of_life_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    signs_of_life_come_often(monkeypatch)


def disturbed(rank: int, who: int, at: int, what: Any, timeout: float) -> Any:
    """Train; worker ``who`` does ``what`` to itself when batch ``at`` begins."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=4, exchange_timeout=timeout)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == who and batch_idx == at:
            what()

    module.on_train_batch_start = on_train_batch_start
    fitting = trainer(int(os.environ["WORLD_SIZE"]), strategy)
    fitting.fit(module, loader(rank, STEPS))
    return fitting.global_step


def fail() -> None:
    raise ZeroDivisionError("bad batch")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("what", [fail, kill, stop])
def test_the_others_end_with_an_error_that_names_the_missing(who: int, what: Any) -> None:
    with Workers(disturbed, who, 6, what, 1.5, workers=3) as group:
        ended = group.collect(40, without=who)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "step 4" in outcome.message or "step 8" in outcome.message
        assert f"Worker {who} " in outcome.message
    if what is fail:
        reason = "ended with .ZeroDivisionError: bad batch"
        assert all(re.search(reason, o.message) for o in ended), ended
    if what is kill:
        assert all("is gone (killed?)" in o.message for o in ended), ended


def in_validation(rank: int, collective: Any) -> None:
    """Train and validate; worker 2 stops where the others enter a collective."""
    module = Toy(SGD)
    module.validation_step = lambda batch, batch_idx: None

    def on_validation_epoch_end() -> None:
        if rank == 2:
            stop()
        collective(module)

    module.on_validation_epoch_end = on_validation_epoch_end
    fitting = trainer(3, EASGDStrategy(tau=4, exchange_timeout=1.5), num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 6), loader(rank, 2))


def barrier(module: Toy) -> None:
    module.trainer.strategy.barrier()


def broadcast(module: Toy) -> None:
    module.trainer.strategy.broadcast("a path", src=2)


def reduction(module: Toy) -> None:
    module.log("loss", torch.ones(()), sync_dist=True)


def gathering(module: Toy) -> None:
    module.all_gather(torch.ones(2))


@pytest.mark.parametrize("collective", [barrier, broadcast, reduction, gathering])
def test_lightnings_collectives_name_the_missing_and_the_last_exchange(collective: Any) -> None:
    with Workers(in_validation, collective, workers=3) as group:
        ended = group.collect(40, without=2)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert f"Lightning's {collective.__name__} at step 6, after exchange 1" in outcome.message
        assert "Worker 2 gave no sign of life" in outcome.message


def metric(module: Toy) -> None:
    mean = torchmetrics.MeanMetric()
    mean.update(1.0)
    mean.compute()


def users(module: Toy) -> None:
    torch.distributed.all_reduce(torch.ones(2))


@pytest.mark.skipif(
    not hasattr(torch.distributed, "set_timeout"), reason="gloo keeps its first timeout"
)
@pytest.mark.parametrize("collective", [metric, users])
def test_collectives_of_metrics_and_users_end_and_name_the_missing(collective: Any) -> None:
    with Workers(in_validation, collective, workers=3) as group:
        ended = group.collect(40, without=2)
    for outcome in ended:
        assert outcome.error == "RuntimeError", outcome
        assert "gloo" in outcome.message
        assert "Worker 2 gave no sign of life" in outcome.message


def in_set_up(rank: int, who: int, what: Any) -> None:
    """Worker ``who`` does ``what`` to itself before training is set up."""
    module, strategy = Toy(SGD), EASGDStrategy(timeout=timedelta(seconds=2))
    module.configure_model = what if rank == who else (lambda: None)
    try:
        trainer(3, strategy).fit(module, loader(rank, STEPS))
    finally:
        left = [each.name for each in threading.enumerate()]
        # Worker 0 takes the store with it: no thread that still connects to it can be ended.
        assert who == 0 or "easgd-heartbeat" not in left


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("what", [fail, kill, stop])
def test_nobody_waits_in_set_up_for_who_does_not_come(who: int, what: Any) -> None:
    with Workers(in_set_up, who, what, workers=3) as group:
        ended = group.collect(60, without=who)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "The set-up of training could not be completed" in outcome.message
        assert f"Worker {who} " in outcome.message


def impatient(rank: int) -> None:
    """Set training up; worker 2 stops before, and worker 0 alone gives up soon."""
    module = Toy(SGD)
    module.configure_model = stop if rank == 2 else (lambda: None)
    strategy = EASGDStrategy(timeout=timedelta(seconds=2 if rank == 0 else 50))
    trainer(3, strategy).fit(module, loader(rank, STEPS))


def test_who_waits_in_set_up_when_worker_0_gives_up_knows_what_it_knew() -> None:
    with Workers(impatient, workers=3) as group:
        ended = group.collect(40, without=2)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "Worker 2 did not come" in outcome.message


def late(rank: int) -> Any:
    """Train; worker 2 stops, and worker 1 sleeps until worker 0 has given up."""
    who, what = (1, partial(time.sleep, 4.5)) if rank == 1 else (2, stop)
    return disturbed(rank, who, 6, what, 1.5)


def test_who_comes_when_worker_0_gave_up_knows_what_it_knew() -> None:
    with Workers(late, workers=3) as group:
        first, second = group.collect(40, without=2)
    for outcome in (first, second):
        assert outcome.error == "ExchangeError", outcome
        assert "Worker 2 gave no sign of life" in outcome.message


def test_a_stall_shorter_than_the_timeout_is_survived() -> None:
    stall = partial(time.sleep, 1.0)
    assert run_workers(disturbed, 1, 6, stall, 10.0, workers=2) == [STEPS] * 2


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5", timedelta(0)])
def test_a_timeout_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"exchange_timeout=.* is not allowed"):
        EASGDStrategy(exchange_timeout=value)


SCRIPT = """
import os, signal, sys
from functools import partial
import torch
from toy import Toy, loader, trainer
from lightning_easgd import EASGDStrategy

rank = int(os.environ["RANK"])
module = Toy(partial(torch.optim.SGD, lr=0.1))

def on_train_batch_start(batch, batch_idx):
    if rank == 1 and batch_idx == 6:
        os.kill(os.getpid(), signal.SIGSTOP)

module.on_train_batch_start = on_train_batch_start
trainer(2, EASGDStrategy(tau=4, exchange_timeout=2)).fit(module, loader(0, 24))
"""


def test_a_process_whose_peer_stopped_leaves_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    workers = [
        start(
            [sys.executable, str(script)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, start in enumerate([subprocess.Popen, Forked])
    ]
    try:
        _, errors = workers[0].communicate(timeout=150)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        workers[1].stderr.close()
    assert workers[0].returncode != 0
    assert "ExchangeError" in errors
    assert "Worker 1 gave no sign of life" in errors
