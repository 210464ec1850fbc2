"""When the server that worker 0 starts ends: not while workers are only stopped, and never late."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Workers
from toy import Toy, loader, trainer, weights
from waiting import until

from lightning_easgd import CenterAt, EASGDStrategy

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")

pytestmark = pytest.mark.timeout(120)

LEASE = 2.0
SECONDS = 60


def fit(rank: int, folder: Path, dies: int | None = None) -> Any:
    """Train; in batch 5 say so, and wait until the test lets it go on, or die."""
    module, served = Toy(partial(torch.optim.SGD, lr=0.05)), []

    def on_train_batch_end(*args: Any) -> None:
        if args[2] == 5:
            if rank == 0:
                served.append(fitting.strategy._workers.server.local._process)
                (folder / "server").write_text(f"{served[0].pid}")
            (folder / f"{rank}").touch()
            until((folder / "go on").exists, SECONDS)
            if rank == dies:
                os.kill(os.getpid(), signal.SIGKILL)

    module.on_train_batch_end = on_train_batch_end
    center = CenterAt("local", lease=LEASE)
    strategy = EASGDStrategy(center=center, tau=2, exchange_timeout=60)
    fitting = trainer(2, strategy)
    fitting.fit(module, loader(rank, 20))
    if dies is not None:
        until(lambda: served[0].poll() is not None, SECONDS)
    return weights(module)["w"].tobytes()


def served(folder: Path) -> int:
    """The server, when all workers train."""
    until(lambda: all((folder / f"{rank}").exists() for rank in range(2)), SECONDS)
    return int((folder / "server").read_text())


def is_over(process: int) -> bool:
    """Whether a process has ended, perhaps unnoticed by whoever is its parent now."""
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_workers_that_are_all_stopped_for_longer_than_the_lease_go_on(tmp_path: Path) -> None:
    with Workers(fit, tmp_path, workers=2) as group:
        server = served(tmp_path)
        for process in group.processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2 * LEASE)
        assert not is_over(server)
        (tmp_path / "go on").touch()
        for process in group.processes:
            os.kill(process.pid, signal.SIGCONT)
        found = group.collect(SECONDS)
        assert [outcome.error for outcome in found] == [None, None]
        assert found[0].value == found[1].value
        until(lambda: is_over(server), SECONDS)


def test_a_server_whose_workers_are_all_killed_ends(tmp_path: Path) -> None:
    with Workers(fit, tmp_path, workers=2) as group:
        server = served(tmp_path)
        group.kill()
        until(lambda: is_over(server), SECONDS)


def test_a_server_ends_behind_worker_0_and_one_that_was_killed(tmp_path: Path) -> None:
    with Workers(fit, tmp_path, 1, workers=2) as group:
        server = served(tmp_path)
        (tmp_path / "go on").touch()
        first, killed = group.collect(SECONDS)
        assert "killed" in f"{killed.message}"
        assert first.error is None, first.trace  # it has waited for the end of the server
        assert is_over(server)
