"""How a difference travels: its parameters perhaps in the form of a codec, its buffers as they are.

Buffers lie behind the parameters of their precision, and all their bytes come first, so that each
part begins where its elements may. A message says which codec it is and how many elements are of
buffers. So a retry is the same bytes, and the server keeps nothing of a worker's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.communication.codecs import CODECS, Codec
from lightning_easgd.server.frames import Message
from lightning_easgd.server.model import byte_size, bytes_of, precision, vector_on
from lightning_easgd.server.refusal import malformed

DECODED = ("bf16", "fp16", "int8")
"""The codecs that a server decodes. Each element arrives with every difference."""


@dataclass(frozen=True)
class Form:
    """A codec, and for how much of a vector.

    Args:
        codec: its name; None: all travels as it is.
        buffers: how many elements of each precision, by its name, are of buffers.
    """

    codec: str | None = None
    buffers: Mapping[str, int] = field(default_factory=dict)

    def text(self) -> dict[str, Any]:
        """As plain data."""
        return {"codec": self.codec, "buffers": dict(self.buffers)}

    def byte_size(self, layout: FlatLayout) -> int:
        """Bytes of a vector."""
        if self.codec is None:
            return byte_size(layout)
        whole, encoded = self._sizes(layout)
        return sum(whole) + sum(encoded)

    def encode_(self, vector: FlatVector) -> list[memoryview]:
        """The bytes of a vector in host memory, which becomes what arrives of it."""
        if self.codec is None:
            return bytes_of(vector)
        whole, values = self._split(vector)
        codec, pieces = self._codec, list(whole)
        for part in values:
            wire = codec.encode(part)
            part.copy_(codec.decode(wire, part.numel(), part.dtype))
            pieces.append(wire)
        return [piece.numpy().data for piece in pieces]

    def decode(self, message: Message, layout: FlatLayout, memory: Tensor) -> FlatVector:
        """The inverse of :meth:`encode_`, for the bytes that come with a message.

        Args:
            message: whose payload was not read yet.
            layout: of the vector.
            memory: for it.

        Raises:
            Refused: other bytes come, or there is no memory for them.
        """
        if self.codec is None:
            return vector_on(layout, message.payload(byte_size(layout), memory))
        wire, vector = message.payload(self.byte_size(layout)), vector_on(layout, memory)
        whole, values = self._split(vector)
        sizes = [size for of in self._sizes(layout) for size in of]
        pieces = torch.split(wire, sizes)
        for mine, theirs in zip(whole, pieces, strict=False):
            mine.copy_(theirs)
        for part, piece in zip(values, pieces[len(whole) :], strict=True):
            part.copy_(self._codec.decode(piece, part.numel(), part.dtype))
        return vector

    @property
    def _codec(self) -> Codec:
        assert self.codec is not None
        return CODECS[self.codec]()

    def _sizes(self, layout: FlatLayout) -> tuple[list[int], list[int]]:
        """Bytes of what travels as it is, and of what is encoded, as :meth:`_split` has them."""
        order = sorted(layout.sizes, key=lambda dtype: -dtype.itemsize)
        counts = [(d, layout.sizes[d], buffers_of(self.buffers, d)) for d in order]
        whole = [dtype.itemsize * buffers for dtype, _, buffers in counts]
        return whole, [self._codec.wire_bytes(n - b) for _, n, b in counts if n > b]

    def _split(self, vector: FlatVector) -> tuple[list[Tensor], list[Tensor]]:
        """What travels as it is, as bytes, and the values that are encoded."""
        parts = sorted(vector.parts, key=lambda part: -part.itemsize)
        ends = [(part, part.numel() - buffers_of(self.buffers, part.dtype)) for part in parts]
        whole = [part[end:].view(torch.uint8) for part, end in ends]
        return whole, [part[:end] for part, end in ends if end]


AS_IT_IS = Form()


def form_of(text: Mapping[str, Any], layout: FlatLayout) -> Form:
    """The form that a message says; without a word, all travels as it is.

    Raises:
        Refused: there is none of this kind.
    """
    codec, buffers = text.get("codec"), text.get("buffers", {})
    if codec not in (None, *DECODED):
        raise malformed("codec", codec, f"null, or one of {', '.join(map(repr, DECODED))}")
    sizes = {precision(dtype): size for dtype, size in layout.sizes.items()}
    if not isinstance(buffers, dict) or not all(
        name in sizes and type(count) is int and 0 <= count <= sizes[name]
        for name, count in buffers.items()
    ):
        raise malformed("buffers", buffers, "how many elements of each precision are of buffers")
    return Form(codec, buffers)


def buffers_of(buffers: Mapping[str, int], dtype: torch.dtype) -> int:
    """How many elements of a precision are of buffers."""
    return buffers.get(precision(dtype), 0)
