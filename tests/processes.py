"""Real workers for tests: one forked process each, a hard time limit, results or errors back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launching
from forking import Workers

__all__ = ["Workers", "become_slurm_task", "free_port", "processes_of", "run_workers"]


def run_workers(
    target: Callable[..., Any], *args: Any, workers: int, timeout: float = 60, check: bool = True
) -> list[Any]:
    """Run ``target(rank, *args)`` in ``workers`` processes that can join one process group.

    Returns what each returned, in rank order; with ``check=False`` an ``Outcome`` each. A
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


def free_port() -> int:
    return int(launching.free_port())


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
