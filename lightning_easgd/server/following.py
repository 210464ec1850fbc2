"""A standby in a process of its own: it asks its primary again and again, and may take over."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from safetensors.torch import load

from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import Transport
from lightning_easgd.server.frames import Message, cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.journal import Journal
from lightning_easgd.server.model import byte_size, vector_on
from lightning_easgd.server.refusal import Refused
from lightning_easgd.server.replication import terms_of
from lightning_easgd.server.snapshots import SnapshotFolder
from lightning_easgd.server.standing import Follower
from lightning_easgd.server.values import Added, Snapshot, SnapshotError

log = logging.getLogger(__name__)

_FIRST_DEADLINE = 500.0
"""Seconds that a snapshot may take."""

_FULL = 0.5
"""Seconds between two attempts to keep a difference on a full disk."""

_DEADLINE = 1.3
"""Times the lease: so long a primary may be silent in an answer."""


class Following:
    """Follows a primary in a thread of its own, until it takes over.

    Args:
        handler: of this server, which answers nobody meanwhile.
        transport: to the primary; closed with it.
        folder: of this server's snapshots; what it has is put aside.
        journal: of this server; None: it has none.
        clock: gives seconds.

    Attributes:
        failed: why it cannot follow; None: it can.
    """

    def __init__(
        self,
        handler: Handler,
        transport: Transport,
        folder: SnapshotFolder,
        journal: Journal | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failed: Exception | None = None
        standing = handler.primary.standing
        self.follower = Follower(standing.name, standing.fence)
        self._handler, self._transport = handler, transport
        self._folder, self._journal = folder, journal
        self._clock = clock
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="center-standby")

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """End, and tell the primary that it is alone unless its place was taken."""
        self._ends.set()
        while self._thread.is_alive():
            self._transport.close()  # ends the call that is under way, also one that has just begun
            self._thread.join(0.1)
        if self.follower.complete and not self._handler.primary.standing.serves:
            self.follower.complete = False
            try:
                self._ask(ends=True)
            except (LostError, Refused) as error:
                log.warning("The primary does not know that its standby has ended: %s", error)
        self._transport.close()

    def _run(self) -> None:
        try:
            while not self._ends.is_set() and not self.once():
                pass
        except Exception as error:
            if not self._ends.is_set():
                self.failed = error
                log.error("This server no longer follows its primary: %s", error)

    def once(self) -> bool:
        """Ask the primary once; whether this server has taken its place."""
        since = self._clock()
        try:
            self._take(*self._ask())
        except (LostError, Refused) as error:
            if self.follower.may_take_over(since) and not self._ends.is_set():
                self._take_over()
                return True
            log.info("The primary did not answer its standby: %s", error)
            self._ends.wait(0.1)
        return False

    def _ask(self, *, ends: bool = False) -> tuple[dict[str, Any], Message]:
        lease = self.follower.lease
        first = self.follower.have < 0 or math.isinf(lease)
        deadline = _FIRST_DEADLINE if first else _DEADLINE * lease
        asked = cut({**self.follower.asks(), "ends": ends})
        message = Message(self._transport.call(asked, deadline))
        if "refused" in message.text:
            raise LostError(message.text["message"])
        return message.text, message

    def _take(self, told: dict[str, Any], message: Message) -> None:
        handler, now = self._handler, self._clock()
        ours = terms_of(handler.server.settings)
        if told["settings"] != ours:
            raise SnapshotError(
                f"The primary has {told['settings']}, and its standby {ours}. Give both the same."
            )
        if "facts" in told:
            tensors = load(message.payload(message.payload_bytes).numpy().tobytes())
            self._begin(Snapshot(tensors, told["facts"]), now)
        elif "added" in told:
            layout = handler.server.layout
            memory = message.payload(byte_size(layout))
            added = Added.from_text(told["added"], vector_on(layout, memory))
            if not self._keep(added, now):
                told["have"] = self.follower.have
        else:
            message.payload(0)
        self.follower.hear(told, told["have"], self._clock())

    def _keep(self, added: Added, now: float) -> bool:
        """Add a difference here, too; False if there is no room for it, which is no silence."""
        try:
            with self._handler.lock:
                if self._journal:
                    self._journal.add(added)
                self._handler.server.replay(added, now=now)
        except Refused as refused:
            log.error("No worker gets a receipt until this standby has room: %s", refused)
            self._ends.wait(_FULL)
            return False
        return True

    def _begin(self, snapshot: Snapshot, now: float) -> None:
        with self._handler.lock:
            self._folder.put_aside()
            self._handler.server.restore(snapshot, now=now)
            self._folder.save(snapshot)
            if self._journal:
                self._journal.follow(snapshot.facts["version"])

    def _take_over(self) -> None:
        with self._handler.lock:
            self._handler.primary.take_over(self.follower.fence + 1)
        log.warning(
            "The primary was silent for %.1f s. This server has taken over.",
            self._clock() - self.follower.heard_at,
        )
