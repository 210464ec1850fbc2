"""The names of the workers' files beside a checkpoint, and the removal of those, and only those.

[Note: what is removed] From a folder of ours only files are removed that an earlier save left,
which was replaced or failed. They have names that only a save gives. What lies behind a link stays,
whether the folder is a link or something in it.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

ENTRY = "lightning_easgd"
"""Key of the main file under which the save describes itself."""

SUFFIX = ".workers"

_SAVE_ID = "[0-9a-f]{12}"
_UNFINISHED = r"\.[0-9a-f]{16}\.part"
_OURS = re.compile(rf"({_SAVE_ID})-\d+\.ckpt({_UNFINISHED})?")


class Storage(Protocol):
    """What is used of Lightning's CheckpointIO."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write a dictionary."""

    def load_checkpoint(self, path: Any, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a dictionary."""

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file or folder, if it is there."""


def is_save_id(value: object) -> bool:
    """Whether a value, perhaps from a file, may become part of a file's name."""
    return isinstance(value, str) and re.fullmatch(_SAVE_ID, value) is not None


def workers_folder(path: str | os.PathLike[str]) -> str:
    """The folder of the workers' files beside the main file ``path``."""
    return os.fspath(path) + SUFFIX


def worker_file(path: str | os.PathLike[str], save: str, rank: int) -> str:
    """Where the worker ``rank`` keeps its part of the save with this id."""
    assert is_save_id(save)
    return f"{workers_folder(path)}/{save}-{rank}.ckpt"


def is_there(path: str) -> bool:
    """Whether this worker sees a file, looked for anew."""
    if (local := _local(path)) is not None:
        return os.path.exists(local)
    with suppress(Exception):  # whatever a remote file system raises
        files, place = url_to_fs(path)
        files.invalidate_cache()
        return bool(files.exists(place))
    return False


def remove_saves(
    storage: Storage, path: str, goes: Callable[[str], bool], *, unfinished: bool = True
) -> None:
    """Remove the workers' files beside ``path`` of those saves whose id ``goes``.

    What cannot be removed stays, and is tried again at the next save. A worker that puts its file
    there by itself looks for worker 0's afterwards: see own_pace.py.

    Args:
        storage: removes them.
        path: of the main file.
        goes: is asked of each id.
        unfinished: whether files go that are perhaps still being written.
    """
    folder = workers_folder(path)
    for _ in range(2):  # what came until worker 0's file was gone goes, too
        for name, save in list(_ours(folder)):
            if goes(save) and (unfinished or name.endswith(".ckpt")):
                with suppress(OSError):
                    storage.remove_checkpoint(f"{folder}/{name}")
    remove_if_empty(folder)


def remove_debris(storage: Storage, path: str) -> None:
    """Remove what saves to ``path`` left that were cut short; nothing is being written now.

    Nothing goes on remote paths, and if the main file does not tell which save it belongs to.
    """
    if (local := _local(path)) is None:
        return
    try:
        kept = _mentioned_saves(local)
    except Exception:  # another storage's, or damaged
        return
    remove_saves(storage, path, lambda save: save not in kept)
    folder, name = os.path.split(local)
    unfinished = re.compile(re.escape(name) + _UNFINISHED)
    for found in filter(unfinished.fullmatch, _listed(folder or ".")):
        if _is_file(os.path.join(folder, found)):
            os.remove(os.path.join(folder, found))


def _mentioned_saves(path: str) -> set[str]:
    """Whatever a main file mentions that may be a save's id; read without unpickling it.

    Raises:
        Exception: of any kind; the file is damaged, or of another form.
    """
    if not os.path.exists(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        (content,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        found = re.findall(rf"(?<![0-9a-f]){_SAVE_ID}(?![0-9a-f])".encode(), archive.read(content))
    return {save.decode() for save in found}


def _ours(folder: str) -> Iterator[tuple[str, str]]:
    """Names of files in a folder that saves gave, and the saves' ids."""
    local = _local(folder)
    if local is None:
        names = []
        with suppress(Exception):  # whatever a remote file system raises
            files, place = url_to_fs(folder)
            files.invalidate_cache()
            names = [str(found).rstrip("/").rsplit("/", 1)[-1] for found in files.ls(place, False)]
    elif os.path.islink(local):
        return
    else:
        names = [n for n in _listed(local) if _is_file(os.path.join(local, n))]
    for name in names:
        if found := _OURS.fullmatch(name):
            yield name, found[1]


def remove_if_empty(folder: str) -> None:
    """Remove a folder if nothing is in it; not a link."""
    local = _local(folder)
    with suppress(Exception):  # not empty, not there, or whatever a remote file system raises
        if local is None:
            files, place = url_to_fs(folder)
            if not files.ls(place, False):
                files.rmdir(place)
        elif not os.path.islink(local):
            os.rmdir(local)


def is_link(path: str) -> bool:
    """Whether a path of this machine's is a link."""
    local = _local(path)
    return local is not None and os.path.islink(local)


def _local(path: str) -> str | None:
    """A path of this machine's; None for a remote one."""
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return None if "://" in path or "::" in path else path


def _listed(folder: str) -> list[str]:
    """Names in a folder of this machine's; none if another worker has just removed it."""
    with suppress(OSError):
        return os.listdir(folder)
    return []


def _is_file(path: str) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False
