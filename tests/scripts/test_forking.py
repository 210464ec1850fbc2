"""scripts/forking.py: no signal is lost while workers are forked; tests see where late ones are."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import FORK
from processes import Workers
from waiting import until

STRUCK_WHILE_FORKING = """
import os, signal, sys, time
from forking import Workers

def work(rank):
    time.sleep(60)

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), int(sys.argv[1])))
try:
    with Workers(work, workers=2) as workers:
        workers.collect(20)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_workers_are_forked_ends_them_all(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRUCK_WHILE_FORKING, str(int(number))],
        capture_output=True,
        text=True,
        timeout=15,  # it is also waited for workers, who hold the pipes
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ""


def await_a_child(_: int, path: Path) -> None:
    child = FORK.Process(target=sleep_long, args=(path,), daemon=True)
    child.start()
    child.join()


def sleep_long(path: Path) -> None:
    path.touch()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc: run pytest there")
def test_of_a_worker_that_is_late_the_test_sees_where_it_and_its_forks_are(tmp_path: Path) -> None:
    path = tmp_path / "sleeps"
    with Workers(await_a_child, path, workers=1) as group:
        until(path.exists)
        with pytest.raises(TimeoutError, match="worker 0 was not back") as late:
            group.collect(0.1)
    told = str(late.value)
    # The fork began where it was forked.
    assert (told.count("in await_a_child"), told.count("in sleep_long")) == (2, 1)
