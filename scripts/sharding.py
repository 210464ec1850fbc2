"""The servers of a center that is cut, each in a process of its own, seen as one."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from serving import SECONDS, Watched, together

if TYPE_CHECKING:
    from lightning_easgd.server.serving import Serving

ENDING = 60.0
"""Seconds that a server has for its last snapshot."""


class Shards:
    """Starts the servers, and ends all when one has ended.

    Args:
        start: makes the server of a number, in a process that is forked from this one.
        shards: how many there are.

    Attributes:
        port: of the first, on which workers are answered; the others have the next ones.

    Raises:
        RuntimeError: a server did not start, and says why.
    """

    def __init__(self, start: Callable[[int], Serving], shards: int) -> None:
        context = multiprocessing.get_context("fork")  # without all imports once more
        self._pipes: list[Connection] = []
        self._processes = []
        self._looks: dict[int, dict[str, Any]] = {}
        for number in range(shards):
            here, there = context.Pipe()
            self._pipes.append(here)
            asked = (start, number, there, self._pipes)
            process = context.Process(target=_serve, args=asked)
            process.start()
            there.close()
            self._processes.append(process)
        try:
            self.port, *_ = [self._hear(number)["port"] for number in range(shards)]
        except BaseException:
            self.close()
            raise

    def look(self) -> dict[str, Any]:
        """What all showed last, as one; see together().

        Raises:
            RuntimeError: one has ended.
        """
        for number, pipe in enumerate(self._pipes):
            while number not in self._looks or pipe.poll():
                self._looks[number] = self._hear(number)
        return together(list(self._looks.values()))

    def close(self) -> None:
        """End them, each after a last snapshot."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(ENDING)
            process.kill()
            process.join()

    def _hear(self, number: int) -> dict[str, Any]:
        try:
            said: dict[str, Any] = self._pipes[number].recv()
        except EOFError:
            raise RuntimeError(
                f"The server of shard {number} has ended. The others end, too. Start them again;"
                " they go on where they were."
            ) from None
        if "failed" in said:
            raise RuntimeError(f"shard {number}: {said['failed']}")
        return said


def _serve(
    start: Callable[[int], Serving], number: int, pipe: Connection, others: list[Connection]
) -> None:
    """Serve until the other end of the pipe is closed, or SIGTERM comes."""
    for other in others:  # or this process would keep its own pipe open
        other.close()
    ends = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    signal.signal(signal.SIGTERM, lambda *_: ends.set())
    watched = None
    try:
        watched = Watched(start(number))
        pipe.send({"port": watched.port})
        while not ends.is_set() and not wait([pipe], SECONDS):
            pipe.send(watched.look())
    except Exception as error:
        with suppress(OSError):  # whoever started this may have been killed
            pipe.send({"failed": str(error)})
    finally:
        if watched:
            watched.close()
