"""Buffers of a module that the center has too: BatchNorm's running statistics and others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_easgd.flat import FLAT_DTYPE, FlatLayout, FlatVector, Memory
from lightning_easgd.segments import Piece

BufferPolicy = Literal["average", "local", "broadcast"]


class Statistics:
    """Float buffers of a module (BatchNorm's running statistics and others), and their center.

    ``average``: the mean over the workers; ``broadcast``: those of worker 0; ``local``: every
    worker keeps its own and nothing travels. Integer, complex and 8-bit buffers, and those that
    the state dict leaves out, stay local always.

    Raises:
        ValueError: at an exchange, a buffer that is averaged has another shape than at the start.
    """

    def __init__(self, module: nn.Module, policy: BufferPolicy, rank: int, memory: Memory) -> None:
        self.policy = policy
        self._speaks = policy == "average" or rank == 0
        self._places = [] if policy == "local" else list(_float_buffers(module))
        self._layout = FlatLayout(
            (name, owner.get_buffer(key)) for name, owner, key in self._places
        )
        if self._places:
            self.center = FlatVector(self._layout, memory.allocate(self._layout.sizes))
            self.total = FlatVector(self._layout, memory.allocate(self._layout.sizes))
            self.read_center()

    def __bool__(self) -> bool:
        return bool(self._places)

    def buffers(self) -> list[Tensor]:
        """The module's buffers now: modules may replace a buffer instead of writing into it."""
        buffers = [owner.get_buffer(key) for _, owner, key in self._places]
        for buffer, slot in zip(buffers, self._layout.slots, strict=True):
            if tuple(buffer.shape) != slot.shape:
                raise ValueError(
                    f"Buffer '{slot.name}' had shape {slot.shape} when training began and has"
                    f" {tuple(buffer.shape)} now. Buffers that are averaged keep their shape:"
                    " register it with persistent=False, or set EASGDStrategy(buffers='local')."
                )
        return buffers

    def contribute(self, healthy: bool) -> list[Tensor]:
        """This worker's part of the sum, as flat tensors."""
        if not self:
            return []
        if healthy and self._speaks:
            self.total.read_(self.buffers())
            self._mend()
        else:
            self.total.zero_()
        return self.total.parts

    def _mend(self) -> None:
        """Give up statistics that overflowed, as BatchNorm's do where a scaler skips the step."""
        # Compared with the center's, for some buffers (masks) are infinite by intention.
        parts = zip(self.total.parts, self.center.parts, strict=True)
        if any(bool((mine.isfinite() != center.isfinite()).any()) for mine, center in parts):
            self.load_center()
            self.total.read_(self.buffers())

    def apply(self, healthy: Sequence[bool]) -> None:
        """Take over the sum that arrived; ``healthy`` says which workers contributed."""
        speakers = healthy if self.policy == "average" else healthy[:1]
        if self and any(speakers):
            for center, total in zip(self.center.parts, self.total.parts, strict=True):
                torch.div(total, sum(speakers), out=center)

    def read_center(self) -> None:
        """Make the module's buffers those of the center."""
        if self:
            self.center.read_(self.buffers())

    def values(self, vector: FlatVector) -> Iterator[tuple[Piece, Tensor]]:
        """Each buffer with its values in the center or the sum."""
        for slot, buffer, view in zip(
            self._layout.slots, self.buffers(), vector.views, strict=True
        ):
            yield Piece(slot.name, buffer), view

    def set_worker_aside(self) -> None:
        """Keep the worker's own buffers while the module shows the center."""
        if self:
            self.total.read_(self.buffers())

    def load_center(self) -> None:
        """Overwrite the module's buffers by the center's."""
        if self:
            self.center.write_to(self.buffers())

    def load_worker(self) -> None:
        """Give the worker the buffers that were set aside."""
        if self:
            self.total.write_to(self.buffers())


def _float_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is None or key in owner._non_persistent_buffers_set or id(buffer) in seen:
                continue
            if buffer.is_floating_point() and buffer.dtype in FLAT_DTYPE:
                seen.add(id(buffer))
                yield f"{prefix}.{key}" if prefix else key, owner, key
