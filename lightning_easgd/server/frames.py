"""Messages between workers and a server: a short text, then raw bytes, cut into frames.

    frame, frame, ... = prefix | text in JSON | payload
    prefix            = b"EASG", protocol (2 bytes), size of text (4), size of payload (8)

All integers are little-endian, and so are the payload's elements. Where frames begin and end has
no meaning, so a model may be larger than any message that a transport carries. Sizes are checked
before memory is taken. Nothing is unpickled: the text names an operation and plain values.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.server.refusal import Refusal, Refused

PROTOCOL = 4
"""Raised with every change of what travels."""

FRAME_BYTES = 2 * 2**20
"""Of a full frame: of 1, 2 and 4 MiB about the fastest, and with the least memory in flight."""

MOST_TEXT_BYTES = 16 * 2**20
"""Names and shapes of some 100,000 parameters."""

_PREFIX = struct.Struct("<4sHIQ")
_MAGIC = b"EASG"


def cut(text: dict[str, Any], payload: Sequence[memoryview] = ()) -> Iterator[bytes]:
    """The frames of a message.

    Args:
        text: plain values; their JSON is at most MOST_TEXT_BYTES long.
        payload: bytes that follow, one piece after the other.
    """
    words = json.dumps(text, separators=(",", ":")).encode()
    size = sum(piece.nbytes for piece in payload)
    head = _PREFIX.pack(_MAGIC, PROTOCOL, len(words), size) + words
    for piece in (memoryview(head), *payload):
        for begin in range(0, piece.nbytes, FRAME_BYTES):
            yield bytes(piece[begin : begin + FRAME_BYTES])


class Message:
    """A message that is coming in; its payload is not read before it is asked for.

    Args:
        frames: of the message.
        site: of the sender, as its certificate says; empty if it showed none.

    Attributes:
        text: its plain values.
        payload_bytes: how many bytes follow, as the sender says.

    Raises:
        Refused: it is none, too large, or of another protocol.
    """

    def __init__(self, frames: Iterable[bytes], site: str = "") -> None:
        self.site = site
        self._frames = iter(frames)
        self._left = memoryview(b"")
        magic, protocol, size, self.payload_bytes = _PREFIX.unpack(self._take(_PREFIX.size))
        if magic != _MAGIC:
            raise _malformed("it does not begin as one")
        if protocol != PROTOCOL:
            raise Refused(
                Refusal.OTHER_PROTOCOL,
                f"The message has protocol {protocol}, and here is {PROTOCOL}. Give server and"
                " workers the same version of lightning-easgd.",
            )
        if size > MOST_TEXT_BYTES:
            raise Refused(
                Refusal.TOO_LARGE,
                f"The text of the message has {size} bytes. Allowed: {MOST_TEXT_BYTES}.",
            )
        self.text = _read(self._take(size))

    def payload(self, expected: int, memory: Tensor | None = None) -> Tensor:
        """The bytes that follow, of dtype uint8.

        Args:
            expected: how many there must be.
            memory: of that size, to put them into; None: new memory.

        Raises:
            Refused: there are more or fewer, or there is no memory for them.
        """
        if self.payload_bytes != expected:
            raise _malformed(f"{self.payload_bytes} bytes follow where {expected} are expected")
        memory = allocate(expected) if memory is None else memory
        self._fill(memory.numpy().data)
        self._require_end()
        return memory

    def _take(self, size: int) -> bytearray:
        """The next bytes; memory grows with what has come, not with what was promised."""
        taken = bytearray()
        while len(taken) < size:
            piece = self._next(size - len(taken))
            taken += piece
        return taken

    def _fill(self, memory: memoryview) -> None:
        filled = 0
        while filled < memory.nbytes:
            piece = self._next(memory.nbytes - filled)
            memory[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes

    def _next(self, most: int) -> memoryview:
        while not self._left:
            try:
                self._left = memoryview(next(self._frames))
            except StopIteration:
                raise _malformed("it is cut short") from None
        piece, self._left = self._left[:most], self._left[most:]
        return piece

    def _require_end(self) -> None:
        if self._left or any(self._frames):
            raise _malformed("more follows than it says")


def allocate(size: int) -> Tensor:
    """Memory of dtype uint8, whose values are arbitrary.

    Raises:
        Refused: there is none.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise Refused(
            Refusal.TOO_LARGE, f"There is no memory for {size} bytes ({error})."
        ) from None


def _read(words: bytearray) -> dict[str, Any]:
    try:
        text = json.loads(words, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise _malformed("its text is no JSON") from None
    if not isinstance(text, dict):
        raise _malformed("its text is no object")
    return text


def _no_number(name: str) -> float:
    raise ValueError(name)


def _malformed(what: str) -> Refused:
    return Refused(
        Refusal.MALFORMED,
        f"This is no message of a worker or a server: {what}. Give both the same version of"
        " lightning-easgd, and let nobody else reach the server.",
    )
