"""The process of one host that forks a process for each job."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from omegaconf import OmegaConf

from comparing import link

READY = "ready"


class JobError(RuntimeError):
    """A job failed; its error was printed."""


def serve(config: str) -> None:
    """Do the orders that stand on stdin, a line each, and answer each with a line on stdout.

    Args:
        config: file of the resolved configuration.

    Raises:
        JobError: a job failed.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what jobs print is no answer
        obey = _worker(OmegaConf.load(config))
        print(json.dumps(READY), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            answer = measure_link(order["port"]) if "job" not in order else in_child(obey, order)
            print(json.dumps(answer), file=answers, flush=True)


def measure_link(port: int) -> float | None:
    """Bits per second from host 1 to host 0, on that; None on the others."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        link.send(os.environ["MASTER_ADDR"], port)
    return None if rank else link.receive(port)


def _worker(cfg: Any) -> Callable[[Mapping[str, Any]], Any]:
    from comparing.result import Job
    from comparing.work import Workbench

    work = Workbench(cfg.get("data")).work
    return lambda order: work(Job(**order["job"]), order["settings"], port=order["port"])


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
    process = fork.Process(target=_child, args=(work, args, sender), daemon=True)
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


def _child(work: Callable[..., Any], args: Any, sender: Connection) -> None:
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
