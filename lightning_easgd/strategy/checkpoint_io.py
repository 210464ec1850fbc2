"""Checkpoint files that are whole or absent, also where the temporary folder is another disk."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

from lightning_easgd.checkpoint.ordered_writes import OrderedWrites
from lightning_easgd.strategy.lightning_internals import (
    WrappingCheckpointIO,
    itself,
    wrap_innermost,
)


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
        # Nobody can have put a link there: the name cannot be guessed, and must be new.
        part = f"{name}.{secrets.token_hex(8)}.part"
        try:
            _write_new(checkpoint, part, name)
            os.replace(part, name)
        except BaseException:
            with suppress(FileNotFoundError):
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


def ordered_writes(storage: CheckpointIO) -> OrderedWrites:
    """Writes through a storage; its innermost one is replaced where plugins around it may queue."""
    writes = OrderedWrites(storage, may_queue=isinstance(storage, WrappingCheckpointIO))
    if isinstance(storage, WrappingCheckpointIO):
        wrap_innermost(storage, lambda inner: _Innermost(inner, writes.carry_out))
    return writes


class _Innermost(CheckpointIO):
    """The storage in the middle of plugins, with what belongs to its writes; copied without that.

    Args:
        storage: that the plugins wrapped.
        carry_out: writes through it.
    """

    def __init__(self, storage: Any, carry_out: Callable[..., None]) -> None:
        inner = storage.wrapped if isinstance(storage, _Innermost) else storage
        self.wrapped: CheckpointIO = inner
        self._carry_out = carry_out

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self.wrapped,)

    @override
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self._carry_out(self.wrapped, checkpoint, os.fspath(path), storage_options)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped.load_checkpoint(*args, **kwargs)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.wrapped.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.wrapped.teardown()


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
    recorded = None
    try:
        with os.fdopen(_open_new(part), "wb") as file:
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


def _open_new(path: str) -> int:
    """A descriptor of a new file, to write to, in a folder that is made if need be."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    for tries_left in (2, 1, 0):
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            return os.open(path, flags, 0o666)
        # Another worker just removed the folder, which was empty: makedirs then says that it is
        # there, and open that it is not.
        except (FileExistsError, FileNotFoundError):
            if not tries_left:
                raise
    raise AssertionError


def _flush_folder(folder: str) -> None:
    """Make the new name of a file outlast a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
