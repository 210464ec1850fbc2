"""Who is to blame for a wait that failed, in words."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lightning_easgd.communication.diagnosis import OVER, Sign, State, diagnose
from lightning_easgd.communication.processes import Process, this_process
from lightning_easgd.communication.progress import Progress

TRAINS = Sign(number=7, step=10, place="in a training step", waits_for="", stood=0.5)
WAITS = replace(TRAINS, waits_for="Lightning's barrier at step 10")
MINE = Progress(step=12, waits_for="The exchange that worker 0 began at step 12")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (
            {1: State(ended="ValueError: bad\nbatch"), 2: State(sign=TRAINS, stood=60)},
            'Worker 1 ended with "ValueError: bad\\nbatch".',
        ),
        (
            {1: State(process=123), 2: State(absent=True), 3: State(ended=OVER)},
            "Worker 1 gave no sign of life any more: its process 123 is gone (killed?);"
            " Worker 2 did not come, or ended before;"
            " Worker 3 has left, since its part of the training is over.",
        ),
        (
            {1: State(sign=TRAINS, stood=12.2), 2: State(silent=5.1, sign=WAITS, stood=6)},
            "Worker 2 gave no sign of life for 5 s (killed, stopped or cut off).",
        ),
        (
            {1: State(sign=TRAINS, stood=12.2), 2: State(sign=WAITS, stood=12.2)},
            'Worker 1 is alive but has stood at step 10 ("in a training step") for 12 s.',
        ),
        (
            {1: State(sign=TRAINS, stood=0.4), 2: State(sign=WAITS, stood=12.2)},
            "All workers are alive, but one is too late: worker 1 gets on, at step 10"
            ' ("in a training step").',
        ),
        (
            {1: State(sign=WAITS, stood=12.2)},
            "All workers are alive, but one is too late, or waits for something else, or the"
            ' network between them failed: worker 0 waits for "The exchange that worker 0 began at'
            ' step 12"; worker 1 waits for "Lightning\'s barrier at step 10".',
        ),
    ],
)
def test_who_is_missing_comes_before_who_is_stuck_and_late(
    states: dict[int, State], expected: str
) -> None:
    assert diagnose(states, MINE, 0, stuck_after=3) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "7", "[1, 2]", '[1, "x", "", "", 0]', "[1e999, 1, 1, 1, 1]"),
        pytest.param("[" * 10**5, id="deep"),
    ],
)
def test_what_is_no_sign_is_none(text: str) -> None:
    assert Sign.unpack(text) is None
    assert Sign.unpack(TRAINS.pack()) == TRAINS


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell")
def test_a_process_is_gone_when_it_ended_also_before_anybody_waited_for_it() -> None:
    mine = this_process()
    assert mine is not None
    assert mine.number == os.getpid()
    assert not mine.is_gone()
    assert replace(mine, started="1").is_gone()  # its number was given to another
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    state = Process(mine.machine, child.pid, _started(child.pid))
    assert not state.is_gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state.is_gone()
    child.communicate()
    assert state.is_gone()


def _started(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]
