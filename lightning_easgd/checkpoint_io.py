"""Checkpoint files that are whole or absent, also where the temporary folder is another disk."""

from __future__ import annotations

import io
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part$")
"""How the name of a file ends that is still being written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own, except that a local file is written beside its final name and then renamed.

    Lightning writes to the system's temporary folder and moves the file, which copies it, in steps
    that a crash can cut short, where that folder lies on another file system. Written straight to
    the disk, a checkpoint also takes no second copy in memory. Remote paths are written by
    Lightning. Those of the web are read anew each time: torch keeps what it once read by the name
    of the file, in whatever folder it was, and unpickles anything.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written, with the path; what was there before is whole.
        """
        name = os.fspath(path)
        if storage_options is not None or "://" in name:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        folder = os.path.dirname(name) or "."
        os.makedirs(folder, exist_ok=True)
        # Nobody can have put a link there: the name cannot be guessed, and must be new.
        part = f"{name}.{secrets.token_hex(8)}.part"
        try:
            _write_new(checkpoint, part, name)
            os.replace(part, name)
        except BaseException:
            if os.path.lexists(part):
                os.remove(part)
            raise
        _flush_folder(folder)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; one from the web without unpickling, unless ``weights_only=False``."""
        name = os.fspath(path)
        if not name.startswith(("http://", "https://")):
            return super().load_checkpoint(path, map_location, weights_only)
        with get_filesystem(name).open(name, "rb") as file:
            content = io.BytesIO(file.read())
        strictly = weights_only is not False
        checkpoint: dict[str, Any] = torch.load(content, map_location, weights_only=strictly)
        return checkpoint


class _Recorded:
    """A file that knows which error ended it: torch's writer raises another one afterwards."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_new(checkpoint: dict[str, Any], part: str, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    recorded = None
    try:
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            recorded = _Recorded(file)
            torch.save(checkpoint, recorded)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = recorded.error if recorded and recorded.error else error
        if not isinstance(cause, OSError):
            raise
        said = f"{cause.strerror}; the checkpoint was not saved"
        raise OSError(cause.errno, said, name) from error


def _flush_folder(folder: str) -> None:
    """Make the new name of a file outlast a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
