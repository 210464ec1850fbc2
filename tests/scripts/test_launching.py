"""Starting and ending the workers of a job, with programs that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launching
import pytest
from launching import WorkerError, is_worker, run_workers

SLEEP = "import time; time.sleep(60)"


def program(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


def alive(folder: Path) -> list[int]:
    """Process numbers that workers wrote into ``folder`` and that still run."""
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


WRITE_PID = """
import os, sys
rank = os.environ["LOCAL_RANK"]
open(sys.argv[1] + "/" + rank + ".pid", "w").write(str(os.getpid()))
"""


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
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")
    text = f"import os; print(*[os.environ[n] for n in {names}])"
    run_workers(program(text), workers=3, nodes=1, logs=tmp_path)
    assert not (tmp_path / "worker0.log").exists()
    for rank in (1, 2):
        assert (tmp_path / f"worker{rank}.log").read_text() == f"{rank} {rank} 0 3 127.0.0.1\n"
    assert "LOCAL_RANK" not in os.environ


def test_workers_of_a_later_node_are_numbered_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    text = "import os; print(*[os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')])"
    run_workers(program(text), workers=2, nodes=3, logs=tmp_path)
    assert (tmp_path / "worker1.log").read_text() == "3 6 10.0.0.1\n"


def test_a_multi_node_job_without_its_variables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NODE_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        run_workers(program(""), workers=1, nodes=2, logs=tmp_path)


def test_a_failing_worker_ends_the_others_and_shows_its_log(tmp_path: Path) -> None:
    text = WRITE_PID + f"if rank == '1': raise KeyError('broken here')\n{SLEEP}"
    with pytest.raises(WorkerError, match=r"(?s)worker 1 failed with exit code 1.*broken here"):
        run_workers([*program(text), str(tmp_path)], workers=3, nodes=1, logs=tmp_path)
    assert alive(tmp_path) == []


def test_a_worker_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.5)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    ignore += "import parting; parting.watch_lifeline()\n"
    # Worker 0 fails once worker 1 has written its number, which it does last.
    fail_late = """
if rank == "0":
    import time
    while not os.path.exists(sys.argv[1] + "/1.pid"):
        time.sleep(0.01)
    sys.exit(3)
"""
    text = ignore + WRITE_PID + fail_late + SLEEP
    with pytest.raises(WorkerError, match="worker 0 failed with exit code 3"):
        run_workers([*program(text), str(tmp_path)], workers=2, nodes=1, logs=tmp_path)
    assert alive(tmp_path) == []
    assert (tmp_path / "worker1.log").read_text() == ""  # its launcher lives, and it knows


def test_a_second_ctrl_c_leaves_no_worker_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 1.0)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

    def interrupt_twice() -> None:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    killer = threading.Thread(target=interrupt_twice)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        run_workers(
            [*program(ignore + WRITE_PID + SLEEP), str(tmp_path)],
            workers=2,
            nodes=1,
            logs=tmp_path,
        )
    killer.join()
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_end_all_workers(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=interrupt)
    killer.start()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        run_workers([*program(WRITE_PID + SLEEP), str(tmp_path)], workers=2, nodes=1, logs=tmp_path)
    killer.join()
    assert alive(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def launcher(tmp_path: Path, worker: str, *, by_pipe: bool) -> int:
    """The exit code of a program that starts workers, once it is killed."""
    text = f"""
import os, signal, sys, threading, time
from pathlib import Path
import parting
from launching import run_workers

if {by_pipe}:
    parting._prctl = None  # as where there is none
folder = Path({str(tmp_path)!r})

def be_killed():
    while len(list(folder.glob("*.pid"))) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=be_killed).start()
command = [sys.executable, "-S", "-c", {worker!r}, str(folder)]
run_workers(command, workers=2, nodes=1, logs=folder)
"""
    return subprocess.run([sys.executable, "-c", text], timeout=60).returncode


@pytest.mark.parametrize("by_pipe", [False, True])
def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path, by_pipe: bool) -> None:
    if not by_pipe and sys.platform != "linux":
        pytest.skip("needs Linux, whose kernel signals that a parent is gone: run pytest there")
    watching = "import parting; parting._GRACE_SECONDS = 1; parting.watch_lifeline()\n"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    worker = (watching + deaf if by_pipe else "") + WRITE_PID + SLEEP
    assert launcher(tmp_path, worker, by_pipe=by_pipe) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []
