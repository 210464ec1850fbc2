"""A small disk under a folder, to be filled or made read-only while a training writes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

_MEGABYTES = 16
_BLOCK = bytes(1 << 16)
_BUSY_SECONDS = 5.0


class SmallDisk:
    """A file system in memory that is mounted on ``folder`` within a ``with`` block.

    Raises:
        OSError: it cannot be mounted; only root can, on Linux.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"

    def __enter__(self) -> SmallDisk:
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "chaos", str(self._folder))
        except (OSError, subprocess.CalledProcessError) as error:
            raise OSError(f"{self._folder} cannot get a disk of its own: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self._folder))

    def fill(self) -> None:
        """Leave no room on it."""
        with self._ballast.open("wb", buffering=0) as ballast:
            try:
                while ballast.write(_BLOCK):
                    pass
            except OSError:
                return  # there is none

    def forbid(self) -> None:
        """Make it read-only, between two files."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return _run("mount", "-o", "remount,ro", str(self._folder))
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise

    def restore(self) -> None:
        """Let it have room, and be written to."""
        _run("mount", "-o", "remount,rw", str(self._folder))
        self._ballast.unlink(missing_ok=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
