"""Real workers for tests: one forked process each, a hard time limit, results or errors back."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import launching
from emulation import EmulatedHosts
from forking import Workers

__all__ = [
    "Workers",
    "become_slurm_task",
    "free_port",
    "on_host",
    "processes_of",
    "run_script",
    "run_workers",
]


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


def on_host(rank: int, hosts: EmulatedHosts, target: Callable[..., Any], *args: Any) -> Any:
    """Run ``target(rank, *args)`` as the worker of the emulated host with this number."""
    hosts.enter(rank)
    return target(rank, *args)


def run_script(
    script: Path,
    arguments: Sequence[str],
    *,
    folder: Path,
    workers: int,
    code: int = 0,
    hosts: EmulatedHosts | None = None,
) -> str:
    """Run a script in ``folder``, or each of its workers as under torchrun; what they printed.

    They are forked, and so need not import torch and Lightning, which takes most of a short job.
    With ``hosts``, each runs on one of them.
    """
    target = (_be_script,) if hosts is None else (on_host, hosts, _be_script)
    ended = run_workers(*target, script, arguments, folder, workers=workers, timeout=150)
    printed = "\n".join(text for _, text in ended)
    assert [found for found, _ in ended] == [code] * workers, printed
    return printed


def _be_script(rank: int, script: Path, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    multiprocessing.current_process().daemon = False  # it may start processes
    os.chdir(folder)
    path = folder / f"printed by {rank}"
    with path.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        sys.stdout = sys.stderr = printed
        sys.argv = [str(script), *arguments]
        warnings.resetwarnings()  # not errors, as in tests
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code)
        except BaseException:
            traceback.print_exc()
            code = 1
    text = path.read_text()
    path.unlink()
    return code, text


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
