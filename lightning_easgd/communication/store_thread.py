"""A thread that calls the key-value store that the workers met in, and can be left behind."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress

from torch.distributed import PrefixStore as _PrefixStore  # type: ignore[attr-defined]
from torch.distributed import Store as _Store  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d

Store = _Store

_ANSWER_SECONDS = 5.0
"""How long an answer is waited for."""
_SILENCE_SECONDS = 3.5
_POLL_SECONDS = 0.05

_connections: dict[tuple[int, str, int], Store] = {}
"""By process, host and port: making one may take seconds, where the host's name is looked up."""


def _own_connection(common: Store) -> Store:
    """A connection of this process's own: on the common one torch waits for workers that are late.

    It is made once for all fits that use the same store, and again if that is gone.
    """
    clone = getattr(common, "clone", None)  # since torch 2.9 or so
    if clone is None:
        return common
    store = common
    while isinstance(store, _PrefixStore):
        store = store.underlying_store
    key = os.getpid(), str(getattr(store, "host", "")), int(getattr(store, "port", 0))
    with suppress(KeyError, RuntimeError):
        _connections[key].check([""])
        return _connections[key]
    _connections[key] = clone()
    return _connections[key]


def close_connections() -> None:
    """Close the connections to stores that fits of this process have used."""
    _connections.clear()


class StoreThread:
    """Calls the store at the request of others, and by itself once in a while.

    A store whose host was stopped does not answer, and does not end the call either. So no other
    thread calls it.

    Args:
        name: of what is kept there, which nothing else has or will have.
        by_itself: what to do with the store once in a while.
        period: how often that is, in seconds.
    """

    def __init__(self, name: str, by_itself: Callable[[Store], None], period: float) -> None:
        self._name, self._by_itself, self._period = name, by_itself, period
        self._common = distributed_c10d._get_default_store()
        self._requests: queue.SimpleQueue[tuple[Callable[[Store], None], Future[None]]]
        self._requests = queue.SimpleQueue()
        self._answered = time.monotonic()
        self._stopped = False
        self.is_gone = False
        """Whether the store has ended, with the worker or launcher that held it."""
        self.is_worker_0s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        """Whether worker 0 holds the store; else torchrun does."""
        self._thread = threading.Thread(target=self._run, name="easgd-heartbeat", daemon=True)
        self._thread.start()

    @property
    def is_silent(self) -> bool:
        """Whether the store does not answer."""
        return self.is_gone or time.monotonic() - self._answered > _SILENCE_SECONDS

    def ask(self, request: Callable[[Store], None]) -> None:
        """Have the thread call the store, and wait until it did; not for ever."""
        done: Future[None] = Future()
        self._requests.put((request, done))
        deadline = time.monotonic() + _ANSWER_SECONDS
        # Not at all, if it has not answered for long.
        while self._thread.is_alive() and time.monotonic() < deadline and not self.is_silent:
            with suppress(FutureTimeoutError):
                done.result(_POLL_SECONDS)
                break

    def stop(self) -> None:
        """End the thread, unless it waits for a store that does not answer."""
        self.ask(self._stop)
        self._stopped = True
        if not self.is_silent:
            self._thread.join(_ANSWER_SECONDS)

    def _stop(self, _: Store) -> None:
        self._stopped = True

    def _run(self) -> None:
        try:
            store: Store = _PrefixStore(self._name, _own_connection(self._common))
            while not self._stopped:
                self._by_itself(store)
                self._answered = time.monotonic()
                self._answer(store, until=self._answered + self._period)
        except RuntimeError:
            self.is_gone = True

    def _answer(self, store: Store, until: float) -> None:
        while not self._stopped and (left := until - time.monotonic()) > 0:
            try:
                request, done = self._requests.get(timeout=left)
            except queue.Empty:
                return
            request(store)
            self._answered = time.monotonic()
            done.set_result(None)
