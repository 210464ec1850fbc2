"""What was added since a snapshot, in a file: written before anybody hears that it was added.

    record, record, ..., zeros or nothing
    record = b"EAJ2", digest of what follows (4 bytes), size of text (4), size of payload (8),
             text in JSON, payload

The digest is the CRC-32 of sizes, text, and the tags that AES-GMAC gives the payload's gibibytes. A
processor makes such a tag four times as fast as a CRC-32 (5 MB: .16 instead of .7 ms).
All integers are little-endian. A journal is named after the center that it begins at, and a new one
begins with each snapshot. Those that follow a snapshot that is kept are kept, too. So a snapshot
that is damaged loses nothing.

[Note: cut short] A server that is killed while it writes leaves a record that is not whole. Nobody
heard that it was added, so it is dropped. If a whole record comes after it, the file is damaged.

[Note: room] Room on the disk is taken in large steps before a record is written. A full disk is
noticed then. A journal that no snapshot needs is written over by a later one, since memory for new
pages took longer than all else. What it still has of before is older than its snapshot, so skipped.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.model import bytes_of, vector_on
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.snapshots import DAMAGED, SnapshotFolder
from lightning_easgd.server.values import Added, Snapshot, SnapshotError

try:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The journal of a server needs cryptography: pip install -e '.[async]'."
    ) from error

_NAME = re.compile(r"center-(\d{12})\.journal")
_MARK = b"EAJ2"
_GMAC = AESGCM(bytes(16))
"""With a key that everybody knows: against damage, not against people."""
_TAGGED = 2**30
_HEAD = struct.Struct("<4sIIQ")
_SIZES = struct.Struct("<IQ")
_STEP = 64 * 2**20
"""Bytes of room that are taken at once."""


class Journal:
    """Keeps what a server adds: snapshots in its folder, and between them one record each.

    Args:
        folder: of the snapshots.
        synced: whether a record lies on the disk before it counts as kept. If not, it survives the
            end of the process, but not of the machine.

    Attributes:
        bytes: of the records since the last snapshot.
    """

    def __init__(self, folder: SnapshotFolder, *, synced: bool = False) -> None:
        self.bytes = 0
        self._folder = folder
        self._synced = synced
        self._version = 0
        self._room = 0
        self._file: int | None = None
        _spare(folder).unlink(missing_ok=True)  # perhaps of another center

    def begin(self, snapshot: Snapshot) -> None:
        """Save a first snapshot."""
        try:
            self._folder.save(snapshot)
        except SnapshotError as error:
            raise Refused(Refusal.NOT_KEPT, f"The center cannot be kept. {error}") from error
        self.follow(snapshot.facts["version"])

    def follow(self, version: int) -> None:
        """Begin a new file, with what comes after the center of this version."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if version < self._version:
            _spare(self._folder).unlink(missing_ok=True)
        self._version, self.bytes, self._room = version, 0, 0

    def add(self, added: Added) -> None:
        """Write a record.

        Raises:
            Refused: it cannot be written. The file is as it was.
        """
        text = json.dumps(added.text(), separators=(",", ":")).encode()
        pieces = bytes_of(added.difference)
        payload = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        head = _SIZES.pack(len(text), len(payload)) + text
        record: list[bytes | memoryview] = [
            _MARK + _digest(head, payload).to_bytes(4, "little") + head,
            payload,
        ]
        try:
            self._write(record)
        except OSError as error:
            raise Refused(
                Refusal.NOT_KEPT,
                f"The difference was not added: the journal in {self._folder.path} cannot be"
                f" written ({error}). Make room there. The worker asks again.",
            ) from error

    def close(self) -> None:
        """Give back the room that is left."""
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, self.bytes)
            os.close(self._file)
            self._file = None

    def _write(self, record: Sequence[bytes | memoryview]) -> None:
        if self._file is None:
            self._file = self._open()
        if not os.fstat(self._file).st_nlink:
            raise OSError("it was removed; the next snapshot begins a new one")
        end = self.bytes + sum(len(piece) for piece in record)
        self._take_room(self._file, end)
        place = self.bytes
        for piece in record:
            left = memoryview(piece)
            while left:
                written = os.pwrite(self._file, left, place)
                left, place = left[written:], place + written
        if self._synced:
            getattr(os, "fdatasync", os.fsync)(self._file)
        self.bytes = end

    def _open(self) -> int:
        path = self._folder.path / f"center-{self._version:012d}.journal"
        try:
            os.replace(_spare(self._folder), path)
            file = os.open(path, os.O_WRONLY)
        except FileNotFoundError:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._room = os.fstat(file).st_size
        if self._synced:
            os.fsync(self._folder.handle)
        return file

    def _take_room(self, file: int, end: int) -> None:
        if end <= self._room:
            return
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(file, self._room, end - self._room + _STEP)
            self._room = end + _STEP
        except OSError:  # there may be room for this one
            os.posix_fallocate(file, self._room, end - self._room)
            self._room = end


def remove_journals(folder: SnapshotFolder) -> None:
    """Remove what no snapshot that is kept needs, but for one file to write over."""
    oldest = folder.oldest()
    for version, path in _journals(folder.path):
        if oldest is not None and version < oldest:
            if _spare(folder).exists():
                path.unlink()
            else:
                os.replace(path, _spare(folder))


def _spare(folder: SnapshotFolder) -> Path:
    return folder.path / "spare.journal"


def replay_journals(folder: SnapshotFolder, server: CenterServer, *, now: float) -> int:
    """Add what was added after a server's snapshot, and say how much that was.

    What is damaged is said. Files that do not follow are put aside under another name.
    """
    began = server.version
    paths = [path for _, path in _journals(folder.path)]
    for place, path in enumerate(paths):
        try:
            _replay(path, server, now)
        except (SnapshotError, Refused) as error:
            for later in paths[place:]:
                os.replace(later, later.with_name(later.name + DAMAGED))
            warnings.warn(
                f"The journal {path} cannot be used ({error}) The server goes on after difference"
                f" {server.version}; later ones are lost. It lies there as {path.name}{DAMAGED}.",
                stacklevel=2,
            )
            break
    return server.version - began


def _replay(path: Path, server: CenterServer, now: float) -> None:
    with _content(path) as content:
        if re.match(rb"EAJ\d", content[:4]) and content[:4] != _MARK:
            raise SnapshotError("Another version of this package wrote it.")
    end = 0
    for added, ends in _records(path, server):
        if added.receipt.version > server.version:
            server.replay(added, now=now)
        end = ends
    if _goes_on(path, end, server.version):
        warnings.warn(
            f"The journal {path} is damaged at byte {end}, and was cut off there. The server goes"
            f" on after difference {server.version}; later ones in this file are lost.",
            stacklevel=3,
        )
        os.truncate(path, end)


def _records(path: Path, server: CenterServer) -> Iterator[tuple[Added, int]]:
    """What a journal has up to the first record that is not whole, and where each ends."""
    with _content(path) as content:
        end = 0
        while found := _record(content, end):
            text, payload, end = found
            memory = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            yield Added.from_text(json.loads(text), vector_on(server.layout, memory)), end


def _goes_on(path: Path, end: int, version: int) -> bool:
    """Whether a whole record of a later version comes after one that is not whole."""
    with _content(path) as content:
        found = (_record(content, place) for place in _marks(content, end + 1))
        return any(each and json.loads(each[0])["receipt"]["version"] > version for each in found)


@contextmanager
def _content(path: Path) -> Iterator[bytes | mmap.mmap]:
    if not path.stat().st_size:
        yield b""
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _record(content: bytes | mmap.mmap, place: int) -> tuple[bytes, bytes, int] | None:
    """The text and the payload of a record, and where it ends; None: there is no whole one."""
    if place + _HEAD.size > len(content):
        return None
    mark, digest, text, payload = _HEAD.unpack_from(content, place)
    begin = place + _HEAD.size
    end = begin + text + payload
    if mark != _MARK or end > len(content):
        return None
    with memoryview(content) as view, view[begin + text : end] as covered:
        if _digest(content[begin - _SIZES.size : begin + text], covered) != digest:
            return None
    return content[begin : begin + text], content[begin + text : end], end


def _digest(head: bytes, payload: memoryview) -> int:
    digest = zlib.crc32(head)
    for begin in range(0, len(payload), _TAGGED):
        tag = _GMAC.encrypt(bytes(12), b"", payload[begin : begin + _TAGGED])
        digest = zlib.crc32(tag, digest)
    return digest


def _marks(content: bytes | mmap.mmap, place: int) -> Iterator[int]:
    while (place := content.find(_MARK, place)) >= 0:
        yield place
        place += 1


def _journals(folder: Path) -> list[tuple[int, Path]]:
    """From old to new, each with the version that it begins at."""
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted((int(named[1]), path) for path, named in found if named)
