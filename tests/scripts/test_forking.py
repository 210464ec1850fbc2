"""scripts/forking.py: a signal that comes while workers are being forked is not lost."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
