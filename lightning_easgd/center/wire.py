"""A center as one flat vector in host memory, for a server that keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_easgd.center.center import Center
from lightning_easgd.center.flat import FlatLayout, FlatVector, Memory
from lightning_easgd.center.fragments import Fragment


class Wire:
    """Parameters of a center and, behind them, the buffers that it has too.

    Args:
        center: whose parameters are not cut into fragments, and none of which joins later.
    """

    def __init__(self, center: Center) -> None:
        self._center = center
        self.layout = FlatLayout(
            (slot.name, torch.empty(slot.shape, dtype=slot.dtype, device="meta"))
            for vector in self._centers()
            for slot in vector.layout.slots
        )

    @property
    def fragment(self) -> Fragment:
        """All parameters that take part."""
        (fragment,) = self._center.main.fragments(0, self._center.main.joined)
        return fragment

    def vector(self) -> FlatVector:
        """Memory for all of it, whose values are arbitrary."""
        return FlatVector(self.layout, Memory(torch.device("cpu")).allocate(self.layout.sizes))

    @property
    def buffers(self) -> dict[torch.dtype, int]:
        """How many elements of each precision are of buffers."""
        parameters = self.fragment.layout.sizes
        counts = {d: size - parameters.get(d, 0) for d, size in self.layout.sizes.items()}
        return {dtype: count for dtype, count in counts.items() if count}

    def parameters(self, vector: FlatVector) -> dict[str, Tensor]:
        """Where the parameters lie in a vector, by names that are always the same."""
        name, sizes = self.fragment.name, self.fragment.layout.sizes
        return {f"{name}, {p.dtype}": p[: sizes[p.dtype]] for p in vector.parts if p.dtype in sizes}

    def pack_(self, vector: FlatVector, *parts: FlatVector) -> None:
        """Put parameters, and buffers if there are any, into a vector of this layout."""
        for theirs, mine in self._pieces(vector, *parts):
            theirs.copy_(mine)

    def pack_nothing_(self, vector: FlatVector) -> None:
        """Put a difference of zero, and buffers without a value, into a vector."""
        for part in vector.parts:
            part.fill_(math.nan)
        for part in self.parameters(vector).values():
            part.zero_()

    def read_(self, vector: FlatVector) -> None:
        """Put the center into a vector."""
        self.pack_(vector, *self._centers())

    def write(self, vector: FlatVector) -> None:
        """Let the center be what a vector says."""
        for theirs, mine in self._pieces(vector, *self._centers()):
            mine.copy_(theirs)

    def goes_along(self) -> dict[str, FlatVector]:
        """What goes with the center, by name: its average, and what the rule keeps of it."""
        fragment = self.fragment
        found = {} if fragment.delivered is fragment.center else {"average": fragment.delivered}
        for name in sorted(set.intersection(*map(set, fragment.rule_state))):
            kept = zip(fragment.center.parts, fragment.rule_state, strict=True)
            values = {part.dtype: state[name] for part, state in kept}
            found[name] = FlatVector(fragment.layout, values)
        return {name: self._packed(vector) for name, vector in found.items()}

    def take_along(self, vectors: Mapping[str, FlatVector], moves: int) -> None:
        """The inverse of :meth:`goes_along`, for a center that has moved so often."""
        fragment = self.fragment
        fragment.moves = moves
        for name, vector in vectors.items():
            mine = fragment.delivered
            if name != "average":
                mine = fragment.center.clone()
                for state, part in zip(fragment.rule_state, mine.parts, strict=True):
                    state[name] = part
            if mine is not fragment.center:
                for theirs, part in self._pieces(vector, mine):
                    part.copy_(theirs)

    def _packed(self, parameters: FlatVector) -> FlatVector:
        """A vector with these, and zeros where buffers are."""
        vector = self.vector()
        vector.zero_()
        self.pack_(vector, parameters)
        return vector

    def add(self, vector: FlatVector, weight: float) -> None:
        """Let the center's parameters move by ``weight`` times a vector."""
        for theirs, mine in self._pieces(vector, self.fragment.center):
            mine.add_(theirs.to(mine.device), alpha=weight)

    def pull(self, vector: FlatVector, weight: float) -> None:
        """Take ``weight`` times a vector from the worker, as exchanges do."""
        lost = self.fragment.center.clone()
        for theirs, mine in self._pieces(vector, lost):
            mine.copy_(theirs).mul_(weight)
        self.fragment.pull(lost)

    def _centers(self) -> list[FlatVector]:
        statistics = self._center.statistics
        return [self.fragment.center, *([statistics.center] if statistics else [])]

    def _pieces(self, vector: FlatVector, *parts: FlatVector) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each flat buffer, the piece where each part lies, with the part's own."""
        whole = {part.dtype: part for part in vector.parts}
        ends = dict.fromkeys(whole, 0)
        for part in (each for vector in parts for each in vector.parts):
            begin, ends[part.dtype] = ends[part.dtype], ends[part.dtype] + part.numel()
            yield whole[part.dtype][begin : ends[part.dtype]], part
