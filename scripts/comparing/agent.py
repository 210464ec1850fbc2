"""The process of one host, which forks a process for each job."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from emulation import EmulatedHosts
from forking import write_to
from parting import end_with

from comparing import link

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


class JobError(RuntimeError):
    """A job failed; its error was printed."""


def serve(
    rank: int,
    hosts: EmulatedHosts,
    work: Callable[..., Any],
    threads: int,
    logs: Sequence[Path],
    orders: Sequence[Connection],
    answers: Sequence[Connection],
) -> None:
    """Be the agent of a host, in a process that was forked for it: do orders, and answer each.

    Args:
        rank: the host's number, and that of its log and its connections.
        hosts: on which agents are.
        work: called as ``work(job, settings, port=...)``.
        threads: of each worker.
        logs: files for what jobs print.
        orders: each a port, and either a job with its settings, or a link to measure.
        answers: one to each.

    Raises:
        JobError: a job failed.
    """
    os.setsid()  # Ctrl-C is for the process that ends the hosts
    write_to(logs[rank])
    hosts.enter(rank)
    os.environ |= dict.fromkeys(_THREADS, str(threads))
    _keep_memory()
    while True:
        port, *job = orders[rank].recv()
        found = in_child(partial(work, port=port), *job) if job else measure_link(port)
        answers[rank].send(found)


def _keep_memory() -> None:
    """Have glibc keep what a step frees for the next.

    Else it gives memory back and faults it in again, in one job for a tenth of the time and in the
    next for none of it, whatever the contender.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def measure_link(port: int) -> float | None:
    """Bits per second from host 1 to host 0, on that; None on the others."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        link.send(os.environ["MASTER_ADDR"], port)
    return None if rank else link.receive(port)


def in_child(
    work: Callable[..., Any], *args: Any, why_stop: Callable[[], str | None] = lambda: None
) -> Any:
    """What ``work(*args)`` returns in a process that is forked from this one.

    Args:
        work: what to do.
        *args: of it.
        why_stop: asked once in a second; why there is no use in waiting any more, if so.

    Raises:
        JobError: it raised, the process died, or there is no use in waiting.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(work, args, sender, os.getpid()), daemon=True)
    process.start()
    sender.close()
    try:
        while not receiver.poll(1.0):
            if (reason := why_stop()) is not None:
                raise JobError(reason)
        return receiver.recv()
    except EOFError:
        process.join()
        raise JobError(f"a job ended with exit code {process.exitcode}") from None
    finally:
        process.kill()  # it may have threads that keep it; nothing is left to do for it
        process.join()
        receiver.close()


def _child(work: Callable[..., Any], args: Any, sender: Connection, parent: int) -> None:
    end_with(parent, signal.SIGKILL)
    gc.freeze()  # as other workers do
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        answer = work(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sender.send(answer)
    os._exit(0)
