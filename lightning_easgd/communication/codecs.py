"""Codecs: how a flat tensor of differences is written for the wire, and read from it.

A codec is exact about the size: a tensor of ``numel`` elements always takes ``wire_bytes(numel)``
bytes, so all workers know what to expect. It need not be exact about the values. The worker that
encoded them keeps what was lost; see compressed.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Codec(ABC):
    """Writes flat tensors as bytes.

    Attributes:
        block: how many elements are encoded together, independently of all others. Then every
            worker sums a part of the whole, and traffic does not grow with the number of workers.
            None: a tensor is encoded as a whole. Then every worker sends it to all.
        feedback: whether a worker keeps what encoding lost for the next exchange, and reckons with
            it where that is much; see algorithms/elastic.py. If not, the worker is pulled by what
            was sent, and what was lost stays in its weights. Then encoding a second time what was
            decoded must lose nothing.
    """

    block: ClassVar[int | None]
    feedback: ClassVar[bool]

    def __repr__(self) -> str:
        """Name and options, by which workers are compared."""
        options = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    @abstractmethod
    def wire_bytes(self, numel: int) -> int:
        """Bytes on the wire of a tensor with ``numel`` elements."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The bytes of finite ``values``, of shape (numel,); uint8, of shape (wire_bytes,)."""

    @abstractmethod
    def decode(self, wire: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The values that ``wire`` stands for, of shape (numel,) and precision ``dtype``."""


class Cast(Codec):
    """Values in a shorter floating-point format, at most its largest one in size.

    Relative error at most 2^-9 ("bf16") or 2^-12 ("fp16"), where not subnormal there.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    block = 1
    feedback = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._largest = torch.finfo(dtype).max

    def wire_bytes(self, numel: int) -> int:
        """Two bytes an element."""
        return self.dtype.itemsize * numel

    def encode(self, values: Tensor) -> Tensor:
        """Rounded to nearest, held within the format's range."""
        within = values.clamp(-self._largest, self._largest)
        return within.to(self.dtype).view(torch.uint8)

    def decode(self, wire: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """The same values in ``dtype``."""
        return wire.view(self.dtype).to(dtype)


class Int8(Codec):
    """Each block as whole multiples, from -127 to 127, of a 127th of its largest element's size.

    Absolute error at most 1/254 of the largest element of the block.

    Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", arXiv:2110.02861.
    """

    block = 256
    feedback = True

    def wire_bytes(self, numel: int) -> int:
        """A byte an element, and four for the scale of each block; the last block is filled up."""
        return math.ceil(numel / self.block) * (self.block + 4)

    def encode(self, values: Tensor) -> Tensor:
        """All whole numbers, then all scales."""
        missing = -values.numel() % self.block
        padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
        blocks = padded.view(-1, self.block)
        scales = (torch.linalg.vector_norm(blocks, math.inf, 1, keepdim=True) / 127).float()
        inverse = torch.where(scales > 0, 1 / scales.to(values.dtype), 0.0)
        whole = (blocks * inverse).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat([whole.view(-1).view(torch.uint8), scales.view(-1).view(torch.uint8)])

    def decode(self, wire: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Whole numbers times scales."""
        padded = math.ceil(numel / self.block) * self.block
        whole = wire[:padded].view(torch.int8).view(-1, self.block)
        scales = wire[padded:].view(torch.float32)
        return whole.to(dtype).mul_(scales.to(dtype)[:, None]).view(-1)[:numel]


class TopK(Codec):
    """The ``fraction`` of elements that are largest in size, with their places; the rest is zero.

    An element waits up to 1/fraction exchanges for its turn, so take a small τ.

    Lin et al. 2018, "Deep gradient compression", arXiv:1712.01887.

    Args:
        fraction: of the elements that is sent, in (0, 1]; at least one element.

    Raises:
        ValueError: the fraction is out of range.
    """

    block = None
    feedback = True

    def __init__(self, fraction: float = 0.01) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(
                f"TopK(fraction={fraction!r}) is not allowed. Allowed: a share of the elements in"
                " (0, 1], typically 0.01."
            )
        self.fraction = fraction

    def wire_bytes(self, numel: int) -> int:
        """Eight bytes an element that is sent."""
        return 8 * self._kept(numel)

    def encode(self, values: Tensor) -> Tensor:
        """All places as 32-bit integers, then all values in single precision."""
        places = values.abs().topk(self._kept(values.numel()), sorted=False).indices
        kept = values[places].float()
        return torch.cat([places.int().view(torch.uint8), kept.view(torch.uint8)])

    def decode(self, wire: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero but for what was sent."""
        half = wire.numel() // 2
        places, kept = wire[:half].view(torch.int32), wire[half:].view(torch.float32)
        values = torch.zeros(numel, dtype=dtype, device=wire.device)
        values[places.long()] = kept.to(dtype)
        return values

    def _kept(self, numel: int) -> int:
        return math.ceil(self.fraction * numel)


_PROBED = 4096


def waiting_time(codec: Codec, device: torch.device) -> float:
    """How many exchanges a value waits for its turn, on average: 1 if nothing is held back.

    One over the part of the energy of white noise that is there after encoding and decoding, which
    is 1/fraction where elements are chosen at random, and less where the largest are.
    """
    numel = math.ceil(_PROBED / (codec.block or 1)) * (codec.block or 1)
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(numel, generator=generator, device="cpu").to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        lost = noise - codec.decode(codec.encode(noise), numel, noise.dtype)
    passed = 1 - float(lost.square().sum() / noise.square().sum())
    return 1 / max(passed, 1e-6)


CODECS = {
    "bf16": lambda: Cast(torch.bfloat16),
    "fp16": lambda: Cast(torch.float16),
    "int8": Int8,
    "topk": TopK,
}
"""The codecs that are known by name."""


def choose_codec(compression: str | Codec | None) -> Codec | None:
    """The codec that ``compression`` names or is; None for full precision.

    Raises:
        ValueError: no codec has this name.
        TypeError: it is neither a name nor a codec.
    """
    if compression is None or isinstance(compression, Codec):
        return compression
    if not isinstance(compression, str):
        raise TypeError(
            f"compression={compression!r} is not allowed. Allowed: None, one of {sorted(CODECS)},"
            " or an object of a subclass of lightning_easgd.Codec."
        )
    if compression not in CODECS:
        raise ValueError(
            f"compression={compression!r} is not a codec. Allowed: None (full precision),"
            f" {', '.join(map(repr, sorted(CODECS)))}, or an object of a subclass of"
            " lightning_easgd.Codec."
        )
    return CODECS[compression]()


def codec_name(codec: Codec | None) -> str | None:
    """The name under which such a codec is known; None for none, and for one of the user's."""
    return next((name for name, make in CODECS.items() if repr(make()) == repr(codec)), None)
