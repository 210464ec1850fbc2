"""Talks to a server in a thread of its own, so that training goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from lightning_easgd.server.client import CenterClient
from lightning_easgd.server.sharded import ShardedClient, fulfil
from lightning_easgd.server.values import News

T = TypeVar("T")

_LOOKS = 0.1
"""Seconds between two looks whether the thread has ended."""


class Courier:
    """Runs what a client is to do, one thing after the other; nobody else uses the client.

    In between it gives signs of life, from which the workers that were started together learn of
    each other.

    Args:
        client: closed with it.
        team: how many workers were started together.
        every: seconds between two signs of life.

    Attributes:
        progress: a count that rises while this worker trains.
        finished: whether this worker has sent all that it had.
        stops: whether it wants all of the team to stop.
        told_to_stop: whether another one does.
        began: whether this worker has the center that it begins to train at.
        saves: the newest checkpoints of this worker, as of News; of worker 0 they count.
        told_saves: those of worker 0, as heard last.
    """

    def __init__(
        self, client: CenterClient | ShardedClient, *, team: int = 1, every: float = 10.0
    ) -> None:
        self.client = client
        self.progress: Callable[[], int] = lambda: 0
        self.finished = self.stops = self.told_to_stop = self.began = False
        self.saves: dict[str, str] = {}
        self.told_saves: dict[str, str] = {}
        self._team, self._every = team, every
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: the process may end while a server that is gone is asked again and again.
        self._thread = threading.Thread(target=self._run, name="easgd-center", daemon=True)
        self._thread.start()

    def ask(self, what: Callable[[], T]) -> Future[T]:
        """Have ``what`` done after all that was asked for before."""
        future: Future[T] = Future()
        self._tasks.put((future, what))
        return future

    def beat(self, *, once: bool = False) -> News:
        """Give a sign of life, as part of what is asked; how the team is."""
        said: dict[str, Any] = {"progress": self.progress(), "finished": self.finished}
        said |= {"stops": self.stops, "saves": self.saves}  # told no later than what follows them
        news = self.client.beat(team=self._team, **said, once=once)
        self.told_to_stop |= news.stop
        self.told_saves = news.saves
        return news

    def close(self) -> None:
        """End; what has no answer yet is given up."""
        self.client.abandon()
        self._tasks.put(None)
        while self._thread.is_alive():
            self.client.close()  # ends the call that is under way, also one that has just begun
            self._thread.join(_LOOKS)
        self.client.close()

    def _run(self) -> None:
        due = time.monotonic() + self._every
        while True:
            try:
                task = self._tasks.get(timeout=max(0.0, due - time.monotonic()))
                if task is None:
                    return
                fulfil(*task)
            except Empty:
                pass
            if time.monotonic() >= due:
                with suppress(Exception):  # whoever asks next is told
                    self.beat(once=True)
                due = time.monotonic() + self._every
