"""Workers that raise, are killed or stop answering: the others end, and say who is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Workers, free_port, run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = 24


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
    began = time.monotonic()
    with Workers(disturbed, who, 6, what, 2.0, workers=3) as group:
        ended = group.collect(40, without=who)
    assert time.monotonic() - began < 35
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "step 4" in outcome.message or "step 8" in outcome.message
        assert f"Worker {who} " in outcome.message
    if what is fail and who:
        assert all("ended with ZeroDivisionError: bad batch" in o.message for o in ended)


def late(rank: int) -> Any:
    """Train; worker 2 stops, and worker 1 sleeps until worker 0 has given up."""
    who, what = (1, partial(time.sleep, 9.0)) if rank == 1 else (2, stop)
    return disturbed(rank, who, 6, what, 2.0)


def test_who_comes_when_worker_0_gave_up_knows_what_it_knew() -> None:
    with Workers(late, workers=3) as group:
        first, second = group.collect(40, without=2)
    for outcome in (first, second):
        assert outcome.error == "ExchangeError", outcome
        assert "Worker 2 gave no sign of life" in outcome.message


def test_a_stall_shorter_than_the_timeout_is_survived() -> None:
    stall = partial(time.sleep, 2.0)
    assert run_workers(disturbed, 1, 6, stall, 6.0, workers=2) == [STEPS] * 2


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
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = workers[0].communicate(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        workers[1].stderr.close()
    assert workers[0].returncode != 0
    assert "ExchangeError" in errors
    assert "Worker 1 gave no sign of life" in errors
