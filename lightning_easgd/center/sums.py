"""Memory for the sums in flight: of one exchange at a time, and used again by the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_easgd.center.flat import FlatVector, Memory
from lightning_easgd.center.fragments import Fragment


class Sums:
    """Gives fragments the vectors that their sums travel in.

    Args:
        memory: where they lie.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._having: list[Fragment] = []

    def provide(self, fragments: Sequence[Fragment]) -> None:
        """Give these fragments, and no others, a vector; nothing may be in flight."""
        if fragments == self._having:
            return
        sizes: dict[torch.dtype, int] = {}
        for fragment in fragments:
            for dtype, size in fragment.layout.sizes.items():
                sizes[dtype] = sizes.get(dtype, 0) + size
        self._take_back()
        if any(size > self._capacity(dtype) for dtype, size in sizes.items()):
            self._buffers = {}  # let go of the smaller ones first
            self._buffers = self._memory.allocate(sizes)
        ends = dict.fromkeys(sizes, 0)
        for fragment in fragments:
            buffers = {}
            for dtype, size in fragment.layout.sizes.items():
                buffers[dtype] = self._buffers[dtype][ends[dtype] : ends[dtype] + size]
                ends[dtype] += size
            fragment.total = FlatVector(fragment.layout, buffers)
        self._having = list(fragments)

    def release(self) -> None:
        """Let go of all memory."""
        self._take_back()
        self._buffers = {}

    def _take_back(self) -> None:
        for fragment in self._having:
            fragment.total = None
        self._having = []

    def _capacity(self, dtype: torch.dtype) -> int:
        return self._buffers[dtype].numel() if dtype in self._buffers else -1
