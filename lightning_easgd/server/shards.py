"""A center that is cut by offset, so that several servers have a slice of it each.

Slice i of S has the elements from n i / S to n (i + 1) / S, rounded down, of each flat buffer of n
elements. Its server is one like any other: its parameters are the pieces that lie in the slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_easgd.center.flat import FlatLayout, FlatVector


@dataclass(frozen=True)
class Shard:
    """A slice of a center.

    Args:
        number: of the slice, from 0.
        of: how many there are.
    """

    number: int = 0
    of: int = 1

    def layout(self, whole: FlatLayout) -> FlatLayout:
        """Of the slice: whole parameters, and pieces of those that are cut.

        Raises:
            ValueError: the slice is empty.
        """
        if self.of == 1:
            return whole
        layout = FlatLayout(self._pieces(whole))
        if not any(layout.sizes.values()):
            raise ValueError(
                f"shards={self.of} is not allowed. Allowed: at most as many as the model has"
                " elements. Start the server with fewer."
            )
        return layout

    def slice_of(self, vector: FlatVector, layout: FlatLayout) -> FlatVector:
        """The slice of a vector of the whole; it shares its memory.

        Args:
            vector: of the whole.
            layout: of the slice.
        """
        if self.of == 1:
            return vector
        parts = {part.dtype: part[slice(*self._ends(part.numel()))] for part in vector.parts}
        return FlatVector(layout, parts)

    def tail(self, numel: int, count: int) -> int:
        """How many of the last ``count`` of so many elements the slice has."""
        begin, end = self._ends(numel)
        return max(0, end - max(begin, numel - count))

    def _ends(self, numel: int) -> tuple[int, int]:
        return numel * self.number // self.of, numel * (self.number + 1) // self.of

    def _pieces(self, whole: FlatLayout) -> Iterable[tuple[str, Tensor]]:
        for slot in whole.slots:
            first, last = self._ends(whole.sizes[slot.dtype])
            begin = max(first, slot.offset) - slot.offset
            end = min(last, slot.offset + slot.numel) - slot.offset
            if end - begin == slot.numel and (slot.numel or self.number == 0):
                yield slot.name, torch.empty(slot.shape, dtype=slot.dtype, device="meta")
            elif end > begin:
                name = f"{slot.name}{list(slot.shape)}[{begin}:{end}]"
                yield name, torch.empty(end - begin, dtype=slot.dtype, device="meta")


WHOLE = Shard()


def joined(layout: FlatLayout, slices: Sequence[FlatVector]) -> FlatVector:
    """The vector of the whole whose slices these are, in order."""
    if len(slices) == 1:
        return slices[0]
    found: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in layout.sizes}
    for part in (part for each in slices for part in each.parts):
        found[part.dtype].append(part)
    return FlatVector(layout, {dtype: torch.cat(parts) for dtype, parts in found.items()})


def address_of(address: str, shard: int) -> str:
    """Where the server of a slice is: the port of the first, and one more for each."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + shard}" if port.isdecimal() else address
