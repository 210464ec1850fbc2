"""A center in a process of its own: restored, served, and saved again and again."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Literal

from lightning_easgd.schedules.checks import require_choice, require_count, require_duration
from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.certificates import Certificates, ShutOut
from lightning_easgd.server.grpc_transport import GrpcServer
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.journal import Journal, remove_journals, replay_journals
from lightning_easgd.server.model import byte_size
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.snapshots import SnapshotFolder
from lightning_easgd.server.values import SnapshotError

log = logging.getLogger(__name__)

_LOOKS = 0.1
"""Seconds between two looks whether a snapshot is due."""

_LONGEST_JOURNAL = 2**30
"""Bytes after which a snapshot is due, which begins a new one; or those of 8 models, if larger."""


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
        certificates: as of GrpcServer.
        shut_out: as of GrpcServer.
        insecure: as of GrpcServer.

    Attributes:
        handler: answers the workers, and has the server.
        port: on which workers are answered.

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
        certificates: Certificates | None = None,
        shut_out: ShutOut | None = None,
        insecure: bool = False,
    ) -> None:
        self._seconds = require_duration("seconds", seconds).total_seconds()
        self._adds = adds if adds is None else require_count("adds", adds, "differences")
        require_choice("journal", journal, ("written", "synced", "none"))
        self._folder = SnapshotFolder(folder)
        try:
            self._journal = Journal(self._folder, synced=journal == "synced")
            keeper = None if journal == "none" else self._journal
            self.handler = Handler(CenterServer(settings, keeper))
            self._saved = self._restore()
            self._saved_at = time.monotonic()
            self._grpc = GrpcServer(
                self.handler,
                address,
                certificates=certificates,
                shut_out=shut_out,
                insecure=insecure,
            )
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
        self._grpc.close()
        self._ends.set()
        self._saver.join()
        try:
            self.save()
        finally:
            self._journal.close()
            self._folder.close()

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
                except SnapshotError as error:
                    log.error("%s", error)

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
