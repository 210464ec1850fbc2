"""Starts the workers of one job, each as a fresh process, and ends all of them with the first.

Lightning's own launcher re-runs the command line of the parent: under Hydra's multirun every child
would run the whole sweep, and the variables that it sets would leak into the next job. Here a job's
workers get its composed configuration from a file and their ranks from environments of their own.
The parent needs neither torch nor Lightning, which is why this stands beside the scripts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from parting import Lifeline

_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_LINES_OF_LOG = 25
_ENDING = (signal.SIGINT, signal.SIGTERM)


class WorkerError(RuntimeError):
    """A worker of a job failed."""


def is_worker() -> bool:
    """Whether this process was started as one of several: by us, torchrun, srun or mpirun."""
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_RANK"]
    # Lightning's rule: an interactive shell is srun's task, but what is typed in it is none.
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        names += ["SLURM_NTASKS", "PMI_RANK"]
    return any(name in os.environ for name in names)


def run_workers(command: Sequence[str], *, workers: int, nodes: int, logs: Path) -> None:
    """Run ``command`` as the workers of this node, and wait for all of them.

    Worker 0 writes to the terminal, the others to ``logs/worker<local rank>.log``. When one fails,
    on Ctrl-C and on SIGTERM, the others are asked to end, and killed after 60 seconds. When this
    process is killed they are told to end, and do so by themselves; see parting.py.

    Args:
        command: the program and its arguments.
        workers: processes on this node.
        nodes: nodes of the job. With more than one, the command runs on each of them, with
            NODE_RANK, MASTER_ADDR and MASTER_PORT set.
        logs: an existing folder.

    Raises:
        ValueError: a variable of a multi-node job is missing.
        WorkerError: a worker failed; the message says which, and how its log ends.
        KeyboardInterrupt: on Ctrl-C.
        SystemExit: on SIGTERM.
    """
    shared = _shared_environment(workers, nodes)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with ExitStack() as files:
            lifeline = files.enter_context(Lifeline())
            files.callback(_end, processes)  # while the lifeline tells them that this process lives
            for rank in range(workers):
                log = files.enter_context(_log(logs, rank).open("wb")) if rank else None
                ranks = _ranks(rank, workers, int(shared["NODE_RANK"]))
                processes.append(
                    subprocess.Popen(
                        command,
                        env=shared | ranks | lifeline.variables,
                        stdout=log,
                        stderr=subprocess.STDOUT if rank else None,
                        pass_fds=lifeline.passed,
                        preexec_fn=lifeline.hold,
                    )
                )
            _wait(processes, logs)
    finally:
        signal.signal(signal.SIGTERM, before)


def _shared_environment(workers: int, nodes: int) -> dict[str, str]:
    variables = dict(os.environ)
    if nodes == 1:
        variables |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    missing = [n for n in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in variables]
    if missing:
        raise ValueError(
            f"trainer.num_nodes={nodes}, but {', '.join(missing)} is not set. Run the command on"
            " every node with NODE_RANK=0, 1, ... and MASTER_ADDR and MASTER_PORT of node 0; or"
            " start it with torchrun or srun."
        )
    return variables | {"WORLD_SIZE": str(workers * nodes)}


def _ranks(rank: int, workers: int, node: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank), "RANK": str(node * workers + rank)}


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _log(logs: Path, rank: int) -> Path:
    return logs / f"worker{rank}.log"


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(_POLL_SECONDS)
        codes = [process.poll() for process in processes]
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        # The others fail because of the first; with several at once, any but worker 0 has a log.
        rank = failed[-1]
        raise WorkerError(
            f"worker {rank} failed with exit code {codes[rank]}."
            + (_end_of_log(_log(logs, rank)) if rank else " Its error stands above.")
        )


def _end_of_log(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:]
    return "\n".join([f" The end of {path}:", *lines])


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # A second Ctrl-C must not keep a worker alive.
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for process in processes:
            # After Ctrl-C too, which a terminal sends to all: a second one would end them at once.
            process.terminate()
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)
