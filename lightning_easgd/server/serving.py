"""A center in a process of its own: restored, served, and saved again and again."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from lightning_easgd.schedules.checks import (
    require,
    require_choice,
    require_count,
    require_duration,
)
from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.certificates import Certificates, ShutOut
from lightning_easgd.server.following import Following
from lightning_easgd.server.grpc_transport import GrpcServer, GrpcTransport
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.journal import Journal, remove_journals, replay_journals
from lightning_easgd.server.model import byte_size
from lightning_easgd.server.replication import KeptTwice
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.snapshots import SnapshotFolder
from lightning_easgd.server.standing import Primary, load_standing, save_standing
from lightning_easgd.server.values import SnapshotError

log = logging.getLogger(__name__)

_LOOKS = 0.1
"""Seconds between two looks whether a snapshot is due."""

_LONGEST_JOURNAL = 2**27
"""Bytes after which a snapshot is due, which begins a new one; or those of 8 models, if larger.

Three files as long are written over in turn. Their first pages took several times as long."""


@dataclass(frozen=True)
class Pairing:
    """How two servers share a center, of which one answers and the other may take its place.

    Args:
        standby_of: host and port of the primary; what this server's folder has is put aside.
        alone: say that the standby of this server has ended and never took over, so that it goes on
            without.
        lease: seconds after which a standby takes over from a primary that is silent, or soon
            after; several times what a difference takes to the standby. That of the primary counts.

    Raises:
        ValueError: one is out of range.
    """

    standby_of: str | None = None
    alone: bool = False
    lease: float = 5.0

    def __post_init__(self) -> None:
        require_duration("lease", self.lease)
        both = self.alone and self.standby_of is not None
        require("alone", self.alone, "False for a standby", not both)


class Serving:
    """Goes on from the newest snapshot in a folder, serves, and saves snapshots there.

    A snapshot that cannot be saved is logged, and the server goes on. A difference is in a journal
    before its worker hears that it was added, and is refused for as long as it cannot be written.

    Args:
        settings: of the server.
        folder: of the snapshots.
        address: host and port, as of GrpcServer.
        seconds: between two snapshots, if differences came.
        adds: differences between two snapshots, if that is sooner.
        journal: "written": what was acknowledged survives the end of the process, also a sudden
            one. "synced": and that of the machine; each difference waits for the disk. "none": what
            came after the newest snapshot is lost with the process; workers see it in ``missing``.
        pairing: with another server; None: it may get a standby.
        certificates: as of GrpcServer.
        shut_out: as of GrpcServer.
        insecure: as of GrpcServer.

    Attributes:
        handler: answers the workers, and has the server.
        port: on which workers are answered.
        following: the primary, as a standby does; None: this server began as the primary.

    Raises:
        SnapshotError: another server has the folder, or what is in it cannot be restored.
        ValueError: an argument is out of range.
        OSError: the address is taken, or the folder cannot be made.
    """

    def __init__(
        self,
        settings: Settings,
        folder: str | os.PathLike[str],
        *,
        address: str = "127.0.0.1:0",
        seconds: float = 30.0,
        adds: int | None = None,
        journal: Literal["written", "synced", "none"] = "written",
        pairing: Pairing | None = None,
        certificates: Certificates | None = None,
        shut_out: ShutOut | None = None,
        insecure: bool = False,
    ) -> None:
        self._seconds = require_duration("seconds", seconds).total_seconds()
        self._adds = adds if adds is None else require_count("adds", adds, "differences")
        require_choice("journal", journal, ("written", "synced", "none"))
        pairing = pairing or Pairing()
        if pairing.standby_of:
            transport = GrpcTransport(
                pairing.standby_of, certificates=certificates, insecure=insecure, follow=True
            )
        self._folder = SnapshotFolder(folder)
        try:
            self._journal = Journal(self._folder, synced=journal == "synced")
            kept = None if journal == "none" else self._journal
            primary = _stand(self._folder, pairing)
            self.handler = Handler(
                CenterServer(settings, KeptTwice(kept, primary)), primary=primary
            )
            self._saved = self._restore() if primary.standing.serves else -1
            self._saved_at = time.monotonic()
            self._grpc = GrpcServer(
                self.handler,
                address,
                certificates=certificates,
                shut_out=shut_out,
                insecure=insecure,
            )
            self.following = None
            if pairing.standby_of:
                self.following = Following(self.handler, transport, self._folder, kept)
                self.following.start()
        except BaseException:
            self._folder.close()
            raise
        self.port = self._grpc.port
        self._ends = threading.Event()
        self._saver = threading.Thread(target=self._save_when_due, name="center-snapshots")
        self._saver.start()

    def close(self) -> None:
        """Answer what has come, save a last snapshot, and end.

        Raises:
            SnapshotError: it cannot be saved.
        """
        with ExitStack() as ending:  # from the last line to the first, whatever fails
            ending.callback(self._folder.close)
            ending.callback(self._journal.close)
            ending.callback(self.save)
            ending.callback(self._saver.join)
            ending.callback(self._ends.set)
            ending.callback(self._grpc.close)
            if self.following:
                ending.callback(self.following.close)

    def save(self) -> None:
        """Save a snapshot now, unless the newest one is of the same center.

        Raises:
            SnapshotError: it cannot be saved.
        """
        server = self.handler.server
        with self.handler.lock:
            if not server.has_center or server.version == self._saved:
                return
            snapshot = server.snapshot()
            self._journal.follow(server.version)
        self._saved_at = time.monotonic()
        self._folder.save(snapshot)
        self._saved = snapshot.facts["version"]
        remove_journals(self._folder)

    def _restore(self) -> int:
        """The version of the newest snapshot, or -1; the server goes on after the last journal."""
        server, now = self.handler.server, time.monotonic()
        snapshot = self._folder.load()
        if snapshot:
            server.restore(snapshot, now=now)
        again = replay_journals(self._folder, server, now=now)
        self._journal.follow(server.version)
        return server.version - again if snapshot else -1

    def _save_when_due(self) -> None:
        while not self._ends.wait(_LOOKS):
            if self._is_due():
                try:
                    self.save()
                except Exception as error:  # the next one may be saved
                    log.error("No snapshot was saved: %s", error)

    def _is_due(self) -> bool:
        server = self.handler.server
        came = server.version - max(0, self._saved)
        if time.monotonic() - self._saved_at >= self._seconds:
            return True
        if self._adds is not None and came >= self._adds:
            return True
        longest = _LONGEST_JOURNAL
        if server.has_center:
            longest = max(longest, 8 * byte_size(server.layout))
        return self._journal.bytes >= longest


def _stand(folder: SnapshotFolder, pairing: Pairing) -> Primary:
    """Take the place that the folder and whoever starts the server say."""
    standing = load_standing(folder.path)
    if pairing.standby_of:
        standing = replace(standing, serves=False, standby="")
    elif pairing.alone:
        standing = replace(standing, serves=True, standby="")
    elif not standing.serves:
        raise SnapshotError(
            f"{folder.path} is of a standby that did not take over. Start it with standby_of=, or,"
            " if its primary is lost for good, with alone=true."
        )
    elif standing.standby:
        log.warning(
            "This server answers nobody before its standby is there. If that one took over, start"
            " this one as its standby. If it ended and did not take over, start this one alone."
        )
    save_standing(folder.path, standing)
    return Primary(
        standing,
        run=uuid.uuid4().hex,
        lease=pairing.lease,
        keep=lambda changed: save_standing(folder.path, changed),
    )
