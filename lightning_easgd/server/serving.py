"""A center in a process of its own: restored, served, and saved again and again."""

from __future__ import annotations

import logging
import os
import threading
import time

from lightning_easgd.schedules.checks import require_count, require_duration
from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.certificates import Certificates, ShutOut
from lightning_easgd.server.grpc_transport import GrpcServer
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.snapshots import SnapshotFolder
from lightning_easgd.server.values import SnapshotError

log = logging.getLogger(__name__)

_LOOKS = 0.1
"""Seconds between two looks whether a snapshot is due."""


class Serving:
    """Goes on from the newest snapshot in a folder, serves, and saves snapshots there.

    A snapshot that cannot be saved is logged, and the server goes on. What was added after the
    newest snapshot is lost with the process; workers see it in ``missing``.

    Args:
        settings: of the server.
        folder: of the snapshots.
        address: host and port, as of GrpcServer.
        seconds: between two snapshots, if differences came.
        adds: differences between two snapshots, if that is sooner.
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
        certificates: Certificates | None = None,
        shut_out: ShutOut | None = None,
        insecure: bool = False,
    ) -> None:
        self._seconds = require_duration("seconds", seconds).total_seconds()
        self._adds = adds if adds is None else require_count("adds", adds, "differences")
        self._folder = SnapshotFolder(folder)
        try:
            self.handler = Handler(CenterServer(settings))
            if snapshot := self._folder.load():
                self.handler.server.restore(snapshot, now=time.monotonic())
            self._saved = self.handler.server.version if snapshot else -1
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
        self._saved_at = time.monotonic()
        self._folder.save(snapshot)
        self._saved = snapshot.facts["version"]

    def _save_when_due(self) -> None:
        while not self._ends.wait(_LOOKS):
            came = self.handler.server.version - max(0, self._saved)
            late = time.monotonic() - self._saved_at >= self._seconds
            if late or (self._adds is not None and came >= self._adds):
                try:
                    self.save()
                except SnapshotError as error:
                    log.error("%s", error)
