"""Real workers for tests: one forked process each, a hard time limit, results or errors back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork")


@dataclass
class Outcome:
    """How one worker ended: its return value, or the exception's type and text."""

    value: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""


def run_workers(
    target: Callable[..., Any], *args: Any, workers: int, timeout: float = 60, check: bool = True
) -> list[Any]:
    """Run ``target(rank, *args)`` in ``workers`` processes that can join one process group.

    Returns what each returned, in rank order; with ``check=False`` an :class:`Outcome` each. A
    worker that is not back within ``timeout`` seconds is killed with all others, and the test
    fails.
    """
    with Workers(target, *args, workers=workers) as group:
        outcomes = group.collect(timeout)
    if not check:
        return outcomes
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"worker {rank}: {outcome.trace}"
    return [outcome.value for outcome in outcomes]


class Workers:
    """Workers that run within a ``with`` block; leaving it kills those that still run."""

    def __init__(self, target: Callable[..., Any], *args: Any, workers: int) -> None:
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(workers):
            receiver, sender = _FORK.Pipe(duplex=False)
            process = _FORK.Process(
                target=_worker, args=(target, rank, workers, port, sender, args), daemon=True
            )
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            process.close()
            pipe.close()

    def collect(self, timeout: float, without: int | None = None) -> list[Outcome]:
        """Wait at most ``timeout`` seconds for all workers, or all but ``without``, to end."""
        deadline = time.monotonic() + timeout
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            if rank == without:
                continue
            assert pipe.poll(max(0.0, deadline - time.monotonic())), (
                f"worker {rank} was not back after {timeout} s: a deadlock?"
            )
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                outcomes.append(Outcome(error="Died", message="ended without a result"))
        return outcomes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines of running processes that name ``folder``."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in line:
            found[int(path.parent.name)] = line
    return found


def become_slurm_task(rank: int, port: int) -> None:
    """Replace this worker's variables by those that srun sets for 2 tasks on one node."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR"):
        del os.environ[name]
    os.environ.update(
        SLURM_JOB_ID="7",
        SLURM_JOB_NAME="train",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_NODELIST="127.0.0.1",
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        MASTER_PORT=str(port),
    )


def _worker(target: Any, rank: int, workers: int, port: int, sender: Any, args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(workers),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
    )
    try:
        outcome = Outcome(value=target(rank, *args))
    except BaseException as error:
        outcome = Outcome(
            error=type(error).__name__, message=str(error), trace=traceback.format_exc()
        )
    sender.send(outcome)
    sender.close()
    # Not through interpreter shutdown: a failed worker may have collectives in flight.
    os._exit(0)
