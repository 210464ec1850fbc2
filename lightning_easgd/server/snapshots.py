"""Snapshots of a server in files: each is whole or not there, and a damaged one is noticed.

A snapshot is one safetensors file, which holds tensors and a text and never code. It is written
under another name, and gets its own when it lies on the disk. A digest of all that it holds is in
it. So a file that was cut short or has a bit that flipped is known, and the one before is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_easgd.schedules.checks import require_count
from lightning_easgd.server.values import Snapshot, SnapshotError

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Snapshots of a server need safetensors: pip install -e '.[async]'."
    ) from error

FORMAT = 1
"""Of the facts in a file; a higher one is not read."""

_NAME = re.compile(r"center-(\d{12})\.safetensors")
_PART = ".part"
_ASIDE = ".aside"
DAMAGED = ".damaged"
"""At the end of the name of a file that was put aside."""


class SnapshotFolder:
    """The snapshots of one server, of which the newest are kept.

    Args:
        path: of the folder; made if it is not there.
        keep: how many snapshots are kept.

    Attributes:
        handle: of the folder itself, to have its names written to the disk.

    Raises:
        SnapshotError: another server has the folder.
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = require_count("keep", keep, "snapshots")
        self.path.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise SnapshotError(
                f"Another server writes its snapshots to {self.path}. Give each server a folder of"
                " its own, or end the other one first."
            ) from None
        for left in self.path.glob(f"*{_PART}"):  # by a server that was killed
            if _NAME.fullmatch(left.name.removesuffix(_PART)):
                left.unlink()

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self.handle)

    def save(self, snapshot: Snapshot) -> Path:
        """Write a snapshot, and remove those that are no longer kept.

        Raises:
            SnapshotError: it cannot be written, for example because the disk is full. The
                snapshots that are there stay.
        """
        path = self.path / f"center-{snapshot.facts['version']:012d}.safetensors"
        part = path.with_name(path.name + _PART)
        try:
            _write(snapshot, part)
            os.replace(part, path)
            os.fsync(self.handle)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            raise SnapshotError(
                f"The snapshot {path} cannot be written: {error}. The one before is kept, and the"
                " server goes on. Make room, or give it another folder."
            ) from error
        for old in self._snapshots()[self.keep :]:
            old.unlink()
        return path

    def load(self) -> Snapshot | None:
        """The newest snapshot that is whole; None if there never was one.

        A damaged one is said, and put aside under another name.

        Raises:
            SnapshotError: all are damaged.
        """
        damaged = []
        for path in self._snapshots():
            try:
                return _read(path)
            except (OSError, SafetensorError, SnapshotError, ValueError, KeyError) as error:
                damaged.append(path.name)
                os.replace(path, path.with_name(path.name + DAMAGED))
                warnings.warn(
                    f"The snapshot {path} is damaged ({error}), and the one before is used. It lies"
                    f" there as {path.name}{DAMAGED}. Differences that only it had are lost.",
                    stacklevel=2,
                )
        if damaged:
            raise SnapshotError(
                f"All snapshots in {self.path} are damaged: {', '.join(damaged)}. Take one from a"
                " copy, or begin in an empty folder."
            )
        return None

    def put_aside(self) -> None:
        """Give what is here other names, for a center that begins anew; one such set is kept."""
        for path in self.path.iterdir():
            if path.name.startswith("center-") and path.name.endswith(_ASIDE):
                path.unlink()
        for path in self.path.iterdir():
            if re.fullmatch(r"center-\d{12}\.(safetensors|journal)", path.name):
                os.replace(path, path.with_name(path.name + _ASIDE))

    def oldest(self) -> int | None:
        """The version of the oldest snapshot that is kept; None if there is none."""
        versions = [found[1] for path in self._snapshots() if (found := _NAME.match(path.name))]
        return int(versions[-1]) if versions else None

    def _snapshots(self) -> list[Path]:
        """From new to old."""
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, reverse=True)


def _write(snapshot: Snapshot, path: Path) -> None:
    facts = json.dumps({"format": FORMAT, **snapshot.facts})
    digest = _digest(facts, snapshot.tensors)
    save_file(snapshot.tensors, path, metadata={"facts": facts, "digest": digest})
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _read(path: Path) -> Snapshot:
    with safe_open(path, framework="pt", device="cpu") as file:
        text = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if text["digest"] != _digest(text["facts"], tensors):
        raise SnapshotError("its digest is another one")
    facts: dict[str, Any] = json.loads(text["facts"])
    if facts.pop("format") > FORMAT:
        raise SnapshotError("a later version of lightning-easgd wrote it")
    return Snapshot(tensors, facts)


def _digest(facts: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
