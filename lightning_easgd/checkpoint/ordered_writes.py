"""Writes of checkpoint files, and what must happen before and after each, in that order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_easgd.checkpoint.files import Storage


@dataclass(eq=False)
class Write:
    """What is called when a file is written, in this order.

    Attributes:
        before: before the file is written.
        failed: if that or the write raised.
        after: when the file is there.
        over: when all this is over, whether the file is there or not.
    """

    before: Callable[[], None] = lambda: None
    failed: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    over: list[Callable[[], None]] = field(default_factory=list)

    def perform(self, storage: Storage, content: Any, path: str, options: Any) -> None:
        """Write a file through ``storage``."""
        try:
            self.before()
            storage.save_checkpoint(content, path, storage_options=options)
        except BaseException:
            self.failed()
            raise
        self.after()


class OrderedWrites:
    """Writes through a storage, and does what belongs to each write when that happens.

    [Note: a write that returned] A plugin that wraps a storage, such as Lightning's
    AsyncCheckpointIO, may only have queued a write when it returns. What must not come before the
    write (removing what it replaces) therefore waits in the same queue. The storage in the middle
    of such plugins does it, for which it is wrapped once more.

    Args:
        storage: where files are written to.
        may_queue: whether a write that returned may not have happened yet; then the storage in
            the middle of the plugins has :meth:`carry_out` called for each.
    """

    def __init__(self, storage: Storage, *, may_queue: bool) -> None:
        self.storage = storage
        self.may_queue = may_queue
        self._lock = threading.Lock()
        self._queued: dict[str, deque[Write]] = {}
        self.done = 0
        """How many queued writes are over."""

    def save(self, content: dict[str, Any], path: str, options: Any, write: Write) -> None:
        """Write a file, now or later, as the storage does."""
        if not self.may_queue:
            write.perform(self.storage, content, path, options)
            return
        with self._lock:
            self._queued.setdefault(path, deque()).append(write)
        try:
            self.storage.save_checkpoint(content, path, storage_options=options)
        except BaseException:
            self._give_up(path, write)
            raise

    def _give_up(self, path: str, write: Write) -> None:
        """Take out of its queue what a plugin raised before, so that the next write is first."""
        with self._lock:
            queue = self._queued[path]
            if write not in queue:  # it was carried out, which ended it
                return
            queue.remove(write)
        write.failed()
        for action in write.over:
            action()

    def when_written(self, path: str, action: Callable[[], None]) -> None:
        """Do this after all writes of a file that are queued; now if there are none."""
        with self._lock:
            if queue := self._queued.get(path):
                queue[-1].over.append(action)
                return
        action()

    @property
    def queued(self) -> int:
        """How many writes are not over yet."""
        with self._lock:
            return sum(map(len, self._queued.values()))

    def carry_out(self, storage: Storage, content: Any, path: str, options: Any) -> None:
        """Perform a write that was queued, by the storage that the plugins wrap."""
        queue = self._queued.get(path)
        write = queue[0] if queue else Write()
        try:
            write.perform(storage, content, path, options)
        finally:
            with self._lock:
                if queue and write in queue:
                    queue.remove(write)
                self.done += 1
            for action in write.over:
                action()
