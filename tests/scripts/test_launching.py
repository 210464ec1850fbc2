"""Starting and ending the workers of a job, with programs that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import parting
import pytest
from launching import WorkerError, is_worker, run_workers

NAMES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")


def say_ranks(rank: int) -> int:
    print(*[os.environ[name] for name in NAMES])
    return rank


def sleep(rank: int, folder: Path) -> None:
    """For a minute, with the process's number in a file."""
    (folder / f"{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pid")
    time.sleep(60)


def sleep_deaf(rank: int, folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep(rank, folder)


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.pid"))) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def alive(folder: Path) -> list[int]:
    """Process numbers that workers wrote into ``folder`` and that still run."""
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, False),
        ({"SLURM_NTASKS": "1", "PMI_RANK": "0", "SLURM_JOB_NAME": "interactive"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"PMI_RANK": "0"}, True),
    ],
    ids=str,
)
def test_a_shell_under_srun_is_no_worker_and_what_a_launcher_starts_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    assert is_worker() is expected


def test_every_worker_gets_its_rank_and_a_log(tmp_path: Path) -> None:
    assert run_workers(say_ranks, workers=3, nodes=1, logs=tmp_path) == [0, 1, 2]
    assert not (tmp_path / "worker0.log").exists()
    for rank in (1, 2):
        assert (tmp_path / f"worker{rank}.log").read_text() == f"{rank} {rank} 0 3 127.0.0.1\n"
    assert "LOCAL_RANK" not in os.environ


AFTER_COMPUTING = """
import numpy, torch
import launching
numpy.ones((500, 500)) @ numpy.ones((500, 500))
print(launching._context().get_start_method())
torch.set_num_threads(2)
torch.ones(500, 500) @ torch.ones(500, 500)
print(launching._context().get_start_method())
"""

BESIDE_A_THREAD = """
import pathlib, sys, threading
import launching
held = threading.Event()
thread = threading.Thread(target=held.wait)
thread.start()
assert launching.run_workers(int, workers=2, nodes=1, logs=pathlib.Path(sys.argv[1])) == [0, 1]
print(launching._context().get_start_method())
held.set()
thread.join()
print(launching._context().get_start_method())
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux, where workers are forked: run pytest there"
)
@pytest.mark.parametrize(
    ("code", "methods"),
    [(AFTER_COMPUTING, ["fork", "spawn"]), (BESIDE_A_THREAD, ["spawn", "fork"])],
    ids=["after computing", "beside a thread"],
)
def test_where_there_are_threads_workers_are_no_forks(
    tmp_path: Path, code: str, methods: list[str]
) -> None:
    python = [sys.executable, "-c", code, str(tmp_path)]
    variables = {"PYTHONPATH": str(Path(launching.__file__).parent)}
    said = subprocess.check_output(python, env=os.environ | variables, text=True, timeout=60)
    assert said.split() == methods


def test_workers_of_a_later_node_are_numbered_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    run_workers(say_ranks, workers=2, nodes=3, logs=tmp_path)
    assert (tmp_path / "worker1.log").read_text() == "3 1 1 6 10.0.0.1\n"


def test_a_multi_node_job_without_its_variables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NODE_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        run_workers(say_ranks, workers=1, nodes=2, logs=tmp_path)


def fail_in_one(rank: int, folder: Path, who: int, how: str) -> None:
    """Worker ``who`` fails once the others sleep; worker 0 follows, and says so first."""
    if rank != who:
        sleep(rank, folder)
    wait_for(folder, 2)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    raise KeyError("broken here")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "worker {} failed: KeyError: 'broken here'"),
        ("kill", "worker {} was killed by signal 9 (out of memory? see dmesg)"),
        ("exit", "worker {} ended without a result (exit code 3)"),
    ],
)
def test_a_failing_worker_ends_the_others_and_says_why(
    tmp_path: Path, who: int, how: str, words: str
) -> None:
    with pytest.raises(WorkerError) as caught:
        run_workers(fail_in_one, tmp_path, who, how, workers=3, nodes=1, logs=tmp_path)
    assert str(caught.value) == words.format(who)
    assert alive(tmp_path) == []
    if how == "raise":
        assert "Traceback" in (tmp_path / f"worker{who}.log").read_text()


def fail_late(rank: int, folder: Path) -> None:
    """Worker 1 fails first, and worker 0 is the first to end."""
    if rank == 1:
        error = LookupError("the cause")
        error.raised_at = time.monotonic()
        (folder / "1.pid").touch()
        try:
            time.sleep(20)  # its teardown, until the others have ended
        finally:
            raise error
    wait_for(folder, 1)
    raise RuntimeError("worker 1 is gone")


def terminated(*_: object) -> None:
    raise SystemExit


def fail_late_when_asked(rank: int, folder: Path) -> None:
    signal.signal(signal.SIGTERM, terminated)
    fail_late(rank, folder)


def notice(rank: int, folder: Path, number: int) -> None:
    """Worker 1 dies; worker 0 notices before the parent does, which asks it to end."""
    if rank == 1:
        wait_for(folder, 1)
        os.kill(os.getpid(), number)
    signal.signal(signal.SIGTERM, terminated)
    try:
        sleep(rank, folder)
    finally:
        error = RuntimeError("worker 1 is gone")
        error.raised_at = 0.1
        raise error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_worker_that_died_is_the_cause_though_another_noticed_before(
    tmp_path: Path, number: int
) -> None:
    with pytest.raises(WorkerError, match=rf"^worker 1 was killed by signal {number:d}\b"):
        run_workers(notice, tmp_path, number, workers=2, nodes=1, logs=tmp_path)


def test_the_first_failure_is_the_cause_though_another_ends_before(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^worker 1 failed: LookupError: the cause$"):
        run_workers(fail_late_when_asked, tmp_path, workers=2, nodes=1, logs=tmp_path)
    assert "worker 1 is gone" in (tmp_path / "worker0.log").read_text()


def refuse(rank: int, folder: Path) -> None:
    (folder / f"{rank}.pid").touch()
    wait_for(folder, 2)
    raise ValueError("tau=0")


def test_what_all_workers_say_is_said_of_none(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: tau=0$"):
        run_workers(refuse, tmp_path, workers=2, nodes=1, logs=tmp_path)


def fail_beside_the_deaf(rank: int, folder: Path) -> None:
    if rank:
        sleep_deaf(rank, folder)
    wait_for(folder, 1)
    sys.exit(3)


def test_a_worker_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.5)
    with pytest.raises(WorkerError, match="worker 0 failed: SystemExit: 3"):
        run_workers(fail_beside_the_deaf, tmp_path, workers=2, nodes=1, logs=tmp_path)
    assert alive(tmp_path) == []


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import launching
from test_launching import *

launching._GRACE_SECONDS = 1.0
folder = Path({folder!r})
before = signal.getsignal(signal.SIGTERM)
try:
    launching.run_workers({target}, folder, workers=2, nodes=1, logs=folder)
finally:
    assert signal.getsignal(signal.SIGTERM) is before
"""


def interrupted(folder: Path, target: str, *numbers: signal.Signals) -> int:
    """The exit code of a program that runs workers, and is sent signals."""
    text = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(folder), target=target)
    program = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.DEVNULL)
    try:
        wait_for(folder, 2)
        for number in numbers:
            program.send_signal(number)
            time.sleep(0.3)
        return program.wait(40)
    finally:
        program.kill()
        program.wait()


@pytest.mark.parametrize(
    ("numbers", "target", "code"),
    [
        ([signal.SIGINT], "sleep", -signal.SIGINT),
        ([signal.SIGTERM], "sleep", 143),
        ([signal.SIGINT, signal.SIGINT], "sleep_deaf", -signal.SIGINT),
    ],
)
def test_signals_end_all_workers_also_if_they_come_twice(
    tmp_path: Path, numbers: list[signal.Signals], target: str, code: int
) -> None:
    assert interrupted(tmp_path, target, *numbers) == code
    assert alive(tmp_path) == []


def test_worker_0_reads_what_is_typed(tmp_path: Path) -> None:
    text = (
        "from launching import run_workers; from pathlib import Path\n"
        "def read(rank): return input() if rank == 0 else None\n"
        f"print(run_workers(read, workers=2, nodes=1, logs=Path({str(tmp_path)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], input="continue\n", timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "['continue', None]\n", done.stderr


def sleep_watching(rank: int, folder: Path) -> None:
    """Until the parent is gone."""
    parting.leave_with_parent()
    sleep(rank, folder)


def sleep_deaf_watching_a_pipe(rank: int, folder: Path) -> None:
    """As where the kernel sends no signal, or it is not heeded."""
    parting._prctl(1, 0)
    parting._prctl, parting._GRACE_SECONDS = None, 1.0
    parting.leave_with_parent()
    sleep_deaf(rank, folder)


@pytest.mark.parametrize("target", ["sleep_watching", "sleep_deaf_watching_a_pipe"])
def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path, target: str) -> None:
    if sys.platform != "linux":
        pytest.skip("needs Linux, whose kernel signals that a parent is gone: run pytest there")
    assert interrupted(tmp_path, target, signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []
