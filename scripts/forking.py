"""Workers of one run, each a forked process: what they returned, or why they ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from launching import free_port
from parting import end_with

FORK = multiprocessing.get_context("fork")

_ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Outcome:
    """How one worker ended: its return value, or the exception's type and text."""

    value: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""


class Workers:
    """Workers that run within a ``with`` block; leaving it kills those that still run.

    Args:
        target: called as ``target(rank, *args)`` in every worker, where environment variables let
            it join one process group with the others.
        *args: of target.
        workers: how many there are.
    """

    def __init__(self, target: Callable[..., Any], *args: Any, workers: int) -> None:
        self.pipes, self.processes = [], []
        try:
            with _delayed_signals():
                self._start(target, args, workers)
        except BaseException:
            self.kill()
            raise

    def _start(self, target: Callable[..., Any], args: tuple[Any, ...], workers: int) -> None:
        port = free_port()
        for rank in range(workers):
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(
                target=_worker,
                args=(target, rank, workers, port, sender, args, os.getpid()),
                daemon=True,
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
        deadline = time.monotonic() + timeout
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            if rank == without:
                continue
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"worker {rank} was not back after {timeout:g} s: a deadlock?")
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                outcomes.append(Outcome(error="Died", message="ended without a result"))
        return outcomes


@contextmanager
def _delayed_signals() -> Iterator[None]:
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


def _worker(
    target: Any, rank: int, workers: int, port: str, sender: Any, args: Any, parent: int
) -> None:
    for number in _ENDING:  # not as the process that was forked
        signal.signal(number, signal.SIG_DFL)
    end_with(parent, signal.SIGKILL)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
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
