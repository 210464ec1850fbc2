"""Workers of one run, each a forked process: what they returned, or why they ended."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from parting import end_with

FORK = multiprocessing.get_context("fork")

_ENDING = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.2

DIED = "Died"
"""In place of an exception's type: the worker ended without one."""


@dataclass
class Outcome:
    """How one worker ended: its return value, or the exception's type and text."""

    value: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""
    at: float = field(default_factory=time.monotonic)
    """When it ended, or its exception was raised, as far as it says so."""
    killed: bool = False
    """Whether it died without a word, by itself or by somebody else than these workers' parent."""


class Workers:
    """Workers that run within a ``with`` block; leaving it kills those that still run.

    Args:
        target: called as ``target(rank, *args)`` in every worker, where environment variables let
            it join one process group with the others.
        *args: of target.
        workers: how many there are.
        variables: environment variables that all of them get; None: those of a job on one node.
        logs: an existing folder, where all but the first write to ``worker<rank>.log``; None: all
            write to the terminal.
        context: multiprocessing's, which starts them.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        *args: Any,
        workers: int,
        variables: Mapping[str, str] | None = None,
        logs: Path | None = None,
        context: Any = FORK,
    ) -> None:
        self.pipes, self.processes = [], []
        self._context = context
        variables = variables or one_node(workers)
        try:
            with delayed_signals():
                for rank in range(workers):
                    log = logs / f"worker{rank}.log" if logs and rank else None
                    self._start(rank, target, args, _ranks(rank, workers, variables), log)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, target: Any, args: Any, variables: Any, log: Any) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        with _stdin_for(rank, self._context) as stdin:
            process = self._context.Process(
                target=_worker,
                args=(target, rank, args, variables, log, stdin, sender, os.getpid()),
            )
            process.start()
        sender.close()
        self.pipes.append(receiver)
        self.processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            process.close()
            pipe.close()

    def kill(self) -> None:
        """Kill all workers."""
        for process in self.processes:
            process.kill()

    def collect(self, timeout: float, without: int | None = None) -> list[Outcome]:
        """Wait at most ``timeout`` seconds for all workers, or all but ``without``, to end.

        Raises:
            TimeoutError: one did not.
        """
        ranks = [rank for rank in range(len(self.pipes)) if rank != without]
        found = dict(self.ended(ranks, timeout))
        for rank in ranks:
            if rank not in found:
                raise TimeoutError(f"worker {rank} was not back after {timeout:g} s: a deadlock?")
        return [found[rank] for rank in ranks]

    def ended(
        self, ranks: Iterable[int], timeout: float | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """The workers of these ranks with their outcomes, as they end within ``timeout``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        left = {self.pipes[rank]: rank for rank in ranks}
        while left:
            rest = _POLL_SECONDS if deadline is None else deadline - time.monotonic()
            ready = connection.wait([*left], max(0.0, min(rest, _POLL_SECONDS)))
            # The end of one that is killed does not close its pipe while children of it have it.
            dead = [pipe for pipe, rank in left.items() if not self.processes[rank].is_alive()]
            for pipe in {*ready, *dead}:
                rank = left.pop(pipe)
                yield rank, self._receive(rank)
            if not ready and not dead and rest <= 0:
                return

    def end(self, ranks: Iterable[int], grace: float) -> dict[int, Outcome]:
        """Ask the workers of these ranks to end, kill them after ``grace`` seconds; outcomes."""
        ranks = list(ranks)
        for rank in ranks:
            self.processes[rank].terminate()
        found = dict(self.ended(ranks, grace))
        self.kill()
        for rank, outcome in self.ended(set(ranks) - set(found)):
            found[rank] = replace(outcome, killed=False)
        return found

    def _receive(self, rank: int) -> Outcome:
        try:
            if self.pipes[rank].poll():
                return self.pipes[rank].recv()
        except EOFError:
            pass
        self.processes[rank].join(1)  # it closed its pipe by ending
        code = self.processes[rank].exitcode
        killed = code != -signal.SIGTERM  # by which the parent asks it to end
        return Outcome(error=DIED, message=_how_it_died(code), killed=killed)


def one_node(workers: int) -> dict[str, str]:
    """Environment variables that all workers of a job on this machine share."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(workers),
        "NODE_RANK": "0",
    }


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Let signals that would end this process wait for the end of the ``with`` block.

    Forking calls hooks, those of ``logging`` for one; what a signal handler raises within them,
    KeyboardInterrupt or SystemExit, Python prints and forgets.
    """
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _ranks(rank: int, workers: int, variables: Mapping[str, str]) -> dict[str, str]:
    first = int(variables["NODE_RANK"]) * workers
    return {**variables, "LOCAL_RANK": str(rank), "RANK": str(first + rank)}


def _how_it_died(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended without a result (exit code {code})"
    hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code}{hint}"


@contextmanager
def _stdin_for(rank: int, context: Any) -> Iterator[int | None]:
    """A copy of what this process reads from, which a forked worker 0 keeps, for a debugger in it.

    multiprocessing takes it from all processes that it starts.
    """
    try:
        copy = os.dup(0) if rank == 0 and context is FORK else None
    except OSError:  # there is none
        copy = None
    try:
        yield copy
    finally:
        if copy is not None:
            os.close(copy)


def _worker(
    target: Any,
    rank: int,
    args: Any,
    variables: Any,
    log: Any,
    stdin: int | None,
    sender: Any,
    parent: int,
) -> None:
    for number in _ENDING:  # not as the process that was forked
        signal.signal(number, signal.SIG_DFL)
    end_with(parent, signal.SIGKILL)
    gc.freeze()  # to look for garbage among all imports takes long, and copies their memory
    os.environ.update(variables)
    if log is not None:
        write_to(log)
    if stdin is not None:
        os.dup2(stdin, 0)
        os.close(stdin)
        sys.stdin = os.fdopen(0, closefd=False)
    try:
        outcome = Outcome(value=target(rank, *args))
    except BaseException as error:
        outcome = Outcome(
            error=type(error).__name__, message=str(error), trace=traceback.format_exc()
        )
        outcome.at = getattr(error, "raised_at", outcome.at)
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    sender.send(outcome)
    sender.close()
    # Not through interpreter shutdown: a failed worker may have collectives in flight.
    os._exit(0)


def write_to(log: Path) -> None:
    """Have this process write to a file instead of the terminal."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))
