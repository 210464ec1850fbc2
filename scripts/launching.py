"""Starts the workers of one job, each as a fork of this process, and ends all with the first.

Lightning's own launcher re-runs the command line of the parent: under Hydra's multirun every child
would run the whole sweep, and the variables that it sets would leak into the next job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forking import DIED, FORK, Outcome, Workers, one_node

_GRACE_SECONDS = 60.0
_FOLLOW_SECONDS = 0.5
"""How long others may take to fail after the first, perhaps with the same words."""
_ENDING = (signal.SIGINT, signal.SIGTERM)


class WorkerError(RuntimeError):
    """A worker of a job failed.

    Attributes:
        rank: of the first that failed, on this node.
        outcome: what it said.
        alike: whether all failed with the same words.
    """

    def __init__(self, rank: int, outcome: Outcome, *, alike: bool) -> None:
        super().__init__(rank, outcome)
        self.rank, self.outcome, self.alike = rank, outcome, alike

    def __str__(self) -> str:
        if self.outcome.error == DIED:
            return f"worker {self.rank} {self.outcome.message}"
        if self.outcome.error == "SIGTERMException":  # Lightning's, without words
            return f"worker {self.rank} was asked to end by SIGTERM"
        words = f"{self.outcome.error}: {self.outcome.message}"
        return words if self.alike else f"worker {self.rank} failed: {words}"


def is_worker() -> bool:
    """Whether this process was started as one of several: by torchrun, srun or mpirun."""
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_RANK"]
    # Lightning's rule: an interactive shell is srun's task, but what is typed in it is none.
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        names += ["SLURM_NTASKS", "PMI_RANK"]
    return any(name in os.environ for name in names)


def writes_to_terminal() -> bool:
    """Whether this process speaks for all that a launcher started on this machine, if one did."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def rank_of_worker() -> int | None:
    """This process's number among those that a launcher started; None if none did."""
    if not is_worker():
        return None
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def run_workers(
    target: Callable[..., Any], *args: Any, workers: int, nodes: int, logs: Path
) -> list[Any]:
    """Call ``target(rank, *args)`` in the workers of this node; what each of them returned.

    Worker 0 writes to the terminal, the others to ``logs/worker<local rank>.log``. When one fails,
    on Ctrl-C and on SIGTERM, the others are asked to end, and killed after 60 seconds. When this
    process is killed they are told to end, and do so by themselves; see parting.py.

    Args:
        target: what to call.
        *args: of target.
        workers: processes on this node.
        nodes: nodes of the job. With more than one, the command runs on each of them, with
            NODE_RANK, MASTER_ADDR and MASTER_PORT set.
        logs: an existing folder.

    Raises:
        ValueError: a variable of a multi-node job is missing.
        WorkerError: a worker failed: the first, if the others followed.
        KeyboardInterrupt: on Ctrl-C.
        SystemExit: on SIGTERM.
    """
    variables = _variables(workers, nodes)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        group = Workers(
            target, *args, workers=workers, variables=variables, logs=logs, context=_context()
        )
        with group:
            outcomes = _outcomes(group, workers)
    finally:
        signal.signal(signal.SIGTERM, before)
    _require_success(outcomes, logs)
    return [outcomes[rank].value for rank in range(workers)]


def _context() -> Any:
    """How processes are started: by a fork, where that is safe."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    alone = sys.platform == "linux" and not on_gpu and threading.active_count() == 1
    return FORK if alone and _is_alone_after_fork() else multiprocessing.get_context("spawn")


def _is_alone_after_fork() -> bool:
    """Whether no thread of a library outlives a fork: OpenMP's would be waited for in the child.

    Those of OpenBLAS end before each fork, so that one has to be tried.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of these threads
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 0.2  # one that ends is listed for a moment more
    while (several := len(os.listdir("/proc/self/task")) > 1) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not several


def _variables(workers: int, nodes: int) -> Mapping[str, str]:
    if nodes == 1:
        return one_node(workers)
    names = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"trainer.num_nodes={nodes}, but {', '.join(missing)} is not set. Run the command on"
            " every node with NODE_RANK=0, 1, ... and MASTER_ADDR and MASTER_PORT of node 0; or"
            " start it with torchrun or srun."
        )
    return {name: os.environ[name] for name in names} | {"WORLD_SIZE": str(workers * nodes)}


def _outcomes(group: Workers, workers: int) -> dict[int, Outcome]:
    """Of all workers, which end with the first that fails, or with this process."""
    found: dict[int, Outcome] = {}
    try:
        for rank, outcome in group.ended(range(workers)):
            found[rank] = outcome
            if outcome.error:
                break
        found |= dict(group.ended(set(range(workers)) - set(found), _FOLLOW_SECONDS))
    finally:
        # A second Ctrl-C must not keep a worker alive.
        ignored = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
        found |= group.end([*set(range(workers)) - set(found)], _GRACE_SECONDS)
        for number, handler in ignored.items():
            signal.signal(number, handler)
    return found


def _require_success(outcomes: Mapping[int, Outcome], logs: Path) -> None:
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.error}
    for rank, outcome in failed.items():
        with log_of(rank, logs).open("a") as log:
            log.write(outcome.trace)
    if failed:
        rank = min(failed, key=lambda rank: _when(failed[rank]))
        words = {(outcome.error, outcome.message) for outcome in failed.values()}
        alike = len(words) == 1 and len(failed) == len(outcomes) and failed[rank].message != ""
        raise WorkerError(rank, failed[rank], alike=alike)


def _when(outcome: Outcome) -> float:
    """When a worker failed; others may notice that one was killed before this process does."""
    return 0.0 if outcome.killed else outcome.at


def log_of(rank: int, logs: Path) -> Path:
    """Where a worker writes."""
    return logs / f"worker{rank}.log"
