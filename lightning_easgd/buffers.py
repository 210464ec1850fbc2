"""Buffers of a module that the center has too: BatchNorm's running statistics and others.

[Note: constants] A buffer that nobody writes to keeps its bits, whatever they are. What travels is
the difference from the center, in double precision: it is exactly zero where nothing changed, and
neither it nor the sum of all overflows. What is not finite has no mean. It travels as a number that
is far from all others, so that the sum tells whether all workers have the same infinity. Else the
center keeps its value there, and only there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_easgd.flat import FLAT_DTYPE, FlatLayout, FlatVector, Memory
from lightning_easgd.segments import Piece
from lightning_easgd.storage import (
    Shares,
    compact,
    is_plain,
    overlaps_itself,
    shares,
    storage_of,
)

BufferPolicy = Literal["average", "local", "broadcast"]

_FAR = 2.0**1000
"""What an infinity travels as."""


@dataclass(frozen=True)
class Place:
    """Where in a module a buffer is registered."""

    name: str
    owner: nn.Module
    key: str

    def now(self) -> Tensor | None:
        """The buffer's distinct elements now; modules may replace a buffer instead of writing."""
        buffer = self.owner._buffers.get(self.key)
        return compact(buffer.detach()) if buffer is not None and has_mean(buffer) else None


class Statistics:
    """Float buffers of a module (BatchNorm's running statistics and others), and their center.

    ``average``: the mean over the workers; ``broadcast``: those of worker 0; ``local``: every
    worker keeps its own and nothing travels. Integer, complex and 8-bit buffers, and those that
    the state dict leaves out, stay local always. So does, from then on, one that is dropped or gets
    another shape; that is said once.
    """

    def __init__(self, module: nn.Module, policy: BufferPolicy, rank: int, memory: Memory) -> None:
        self.policy = policy
        self._speaks = policy == "average" or rank == 0
        self._places = [] if policy == "local" else list(_float_buffers(module))
        self._missing: set[str] = set()
        self._places.sort(key=_precision)
        self._layout = FlatLayout(
            (place.name, now) for place in self._places if (now := place.now()) is not None
        )
        double = FlatLayout(
            (slot.name, torch.empty(slot.shape, dtype=torch.float64, device="meta"))
            for slot in self._layout.slots
        )
        if self._places:
            self.center = FlatVector(self._layout, memory.allocate(self._layout.sizes))
            self.total = FlatVector(double, memory.allocate(double.sizes))
            self.read_center()

    def __bool__(self) -> bool:
        return bool(self._places)

    def _present(self) -> list[Tensor | None]:
        """The module's buffers now; None for one that is not there in its shape."""
        found: list[Tensor | None] = []
        for place, slot in zip(self._places, self._layout.slots, strict=True):
            buffer = place.now()
            if buffer is not None and tuple(buffer.shape) != slot.shape:
                buffer = None
            if buffer is None and place.name not in self._missing:
                self._missing.add(place.name)
                self._tell_missing(place, slot.shape)
            found.append(buffer)
        return found

    def _tell_missing(self, place: Place, shape: tuple[int, ...]) -> None:
        buffer = place.owner._buffers.get(place.key)
        now = None if buffer is None else tuple(buffer.shape)
        warnings.warn(
            f"Buffer '{place.name}' had shape {shape} when training began and has {now} now. So it"
            " is not averaged any more: every worker has its own. If that is right, set"
            " EASGDStrategy(buffers='local') or register the buffer with persistent=False; else"
            " let it keep its shape.",
            stacklevel=2,
        )

    def contribute(self, healthy: bool) -> list[Tensor]:
        """This worker's part of the sum, as flat tensors."""
        if not self:
            return []
        if healthy and self._speaks:
            self._read(self.total)
            self._mend()
            for mine, center in self._parts():
                _subtract_(mine, center)
        else:
            self.total.zero_()
        return self.total.parts

    def _read(self, vector: FlatVector) -> None:
        """Read the module's buffers; the sum gets NaN for those that are not there."""
        for part in vector.parts if vector is self.total else []:
            part.fill_(math.nan)
        present = zip(self._present(), vector.views, strict=True)
        vector.read_([view if now is None else now for now, view in present])

    def _mend(self) -> None:
        """Give up normalisations that overflowed, as where a scaler skips the step."""
        if not any(bool(_overflowed(mine, center).any()) for mine, center in self._parts()):
            return
        views = list(zip(self._places, self.total.views, self.center.views, strict=True))
        mended = {
            place.owner
            for place, mine, center in views
            if isinstance(place.owner, _NormBase) and bool(_overflowed(mine, center).any())
        }
        for place, mine, center in views:
            if place.owner in mended and (buffer := place.now()) is not None:
                buffer.copy_(center)
                mine.copy_(center)

    def apply(self, healthy: Sequence[bool]) -> None:
        """Take over the sum that arrived; ``healthy`` says which workers contributed."""
        speakers = healthy if self.policy == "average" else healthy[:1]
        if self and any(speakers):
            for total, center in self._parts():
                _move_(center, total, sum(speakers))

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The sum and the center, cut into parts of one precision of the center."""
        (total,) = self.total.parts
        return zip(
            torch.split(total, list(self._layout.sizes.values())), self.center.parts, strict=True
        )

    def read_center(self) -> None:
        """Make the module's buffers those of the center."""
        if self:
            self._read(self.center)

    def values(self, vector: FlatVector) -> Iterator[tuple[Piece, Tensor]]:
        """Each buffer with its values in the center or the sum."""
        for place, now, view in zip(self._places, self._present(), vector.views, strict=True):
            if now is not None:
                yield Piece(place.name, place.owner.get_buffer(place.key)), view

    def load_center(self) -> None:
        """Overwrite the module's buffers by the center's."""
        if self:
            pairs = zip(self._present(), self.center.views, strict=True)
            self.center.write_to([view.clone() if now is None else now for now, view in pairs])


def _overflowed(mine: Tensor, center: Tensor) -> Tensor:
    return center.isfinite() & ~mine.isfinite()


def _subtract_(mine: Tensor, center: Tensor) -> None:
    """Replace double values by what travels of them; see [Note: constants]."""
    mine.sub_(center.nan_to_num(0, 0, 0))
    mine.masked_fill_(mine.isfinite() & (mine.abs() > _FAR / 4), math.nan)
    mine.clamp_(-_FAR, _FAR)


def _move_(center: Tensor, total: Tensor, workers: int) -> None:
    """Move the center by what arrived from ``workers`` workers; see [Note: constants]."""
    mean = center.nan_to_num(0, 0, 0) + total / workers
    infinite = total.abs() == workers * _FAR
    mean = torch.where(infinite, total * math.inf, mean).to(center.dtype)
    unchanged = (total == 0) & center.isfinite()
    meaningful = infinite | (total.abs() < _FAR / 2)
    center.copy_(torch.where(meaningful & ~unchanged, mean, center))


def _precision(place: Place) -> int:
    now = place.now()
    assert now is not None  # it had a mean
    return FLAT_DTYPE[now.dtype].itemsize


def has_mean(buffer: Tensor) -> bool:
    """Whether buffers of this kind can be averaged."""
    return (
        is_plain(buffer)
        and buffer.is_floating_point()
        and buffer.dtype in FLAT_DTYPE
        and not overlaps_itself(compact(buffer))
    )


def _float_buffers(module: nn.Module) -> Iterator[Place]:
    """Those with a mean, each memory once; what lies in a parameter's memory is the parameter's."""
    known: dict[Any, list[Tensor]] = {}
    for parameter in module.parameters():
        known.setdefault(storage_of(parameter), []).append(parameter)
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is None or key in owner._non_persistent_buffers_set or not has_mean(buffer):
                continue
            others = known.setdefault(storage_of(buffer), [])
            if not any(_follows(buffer, other) for other in others):
                others.append(buffer)
                yield Place(f"{prefix}.{key}" if prefix else key, owner, key)


def _follows(buffer: Tensor, other: Tensor) -> bool:
    """Whether a buffer changes when another tensor in its storage is written to."""
    if storage_of(buffer) is None:
        return buffer is other
    how = shares(buffer, other)
    return how is Shares.ALL or (how is Shares.PART and isinstance(other, nn.Parameter))
