"""Talks to a server in a thread of its own, so that training goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from lightning_easgd.server.client import CenterClient

T = TypeVar("T")


class Courier:
    """Runs what a client is to do, one thing after the other; nobody else uses the client.

    Args:
        client: closed with it.
    """

    def __init__(self, client: CenterClient) -> None:
        self.client = client
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: the process may end while a server that is gone is asked again and again.
        self._thread = threading.Thread(target=self._run, name="easgd-center", daemon=True)
        self._thread.start()

    def ask(self, what: Callable[[], T]) -> Future[T]:
        """Have ``what`` done after all that was asked for before."""
        future: Future[T] = Future()
        self._tasks.put((future, what))
        return future

    def close(self) -> None:
        """End; what has no answer yet is given up."""
        self.client.abandon()
        self._tasks.put(None)
        self.client.close()  # ends the call that is under way, if there is one
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, what = task
            try:
                future.set_result(what())
            except BaseException as error:
                future.set_exception(error)
