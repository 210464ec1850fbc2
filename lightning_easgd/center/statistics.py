"""Buffers of a module that the center has too: BatchNorm's running statistics and others.

[Note: constants] A buffer that nobody writes to keeps its bits, whatever they are. What travels is
the difference from the center, in double precision. It is exactly zero where nothing changed, and
neither it nor the sum of all overflows. A value that is not finite has no mean. It travels as a
number that is far from all others, so the sum tells whether all workers have the same infinity. If
they do not, the center keeps its value in that element.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lightning_easgd.center.flat import FLAT_DTYPE, FlatLayout, FlatVector, Memory, as_real
from lightning_easgd.center.names import listed
from lightning_easgd.center.policies import Buffers, Place, Policies, find_places
from lightning_easgd.center.slices import ParameterSlice
from lightning_easgd.center.spectral import spectral_norms

_FAR = 2.0**1000
"""What an infinity travels as."""


class Statistics:
    """Float buffers of a module (BatchNorm's running statistics and others), and their center.

    ``average``: the mean over the workers; ``broadcast``: those of worker 0; ``recompute``: from
    the center's weights; ``local``: every worker keeps its own and nothing travels. A buffer that
    is dropped or gets another shape is the worker's own as long as that lasts, which is said once.

    Args:
        module: with buffers that are equal on all workers.
        buffers: what becomes of each.
        rank: this worker's number.
        memory: where the center lies.

    Raises:
        ValueError: a pattern names nothing to which its policy could apply.
    """

    def __init__(
        self, module: nn.Module, buffers: Buffers | Policies, rank: int, memory: Memory
    ) -> None:
        self._rank = rank
        self._policies = Policies.check(buffers)
        found = find_places(module, self._policies)
        anew = {place.name for place in found if place.policy == "recompute"}
        self._recomputed = [n for n in spectral_norms(module) if anew.intersection(n.names)]
        self._places = sorted((p for p in found if p.policy != "recompute"), key=_order)
        self._missing: set[str] = set()
        self._known: list[tuple[Tensor | None, object, Tensor | None]]
        self._known = [(None, None, None)] * len(self._places)
        """What is registered at each place, where that lies, and its distinct elements."""
        self._silent = {place.name for place in self._places if place.chosen}
        self._layout = FlatLayout(
            (place.name, now) for place in self._places if (now := place.now()) is not None
        )
        double = FlatLayout(
            (slot.name, torch.empty(slot.shape, dtype=torch.float64, device="meta"))
            for slot in self._layout.slots
        )
        sizes = {slot.name: slot.numel for slot in self._layout.slots}
        kinds = [list(places) for _, places in groupby(self._places, key=_order)]
        self._kinds = [(each, [sizes[place.name] for place in each]) for each in kinds]
        """Places of one precision, policy and choice, which lie together, and their sizes."""
        if self._places:
            self.center = FlatVector(self._layout, memory.allocate(self._layout.sizes))
            self.total = FlatVector(double, memory.allocate(double.sizes))
            self.read_center()

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def names(self) -> list[str]:
        """Of the buffers and frozen parameters that the center has too."""
        return [place.name for place in self._places]

    def is_chosen(self, frozen: str) -> bool:
        """Whether a pattern says what becomes of this frozen parameter."""
        return self._policies.choose(frozen, frozen=True) is not None

    def moved_by_forward(self) -> set[str]:
        """Names of what a forward pass in train() writes to, whatever the module is."""
        vectors = {name for norm in self._recomputed for name in norm.names}
        return vectors | {place.name for place in self._places if place.is_normalisation}

    def counters(self) -> dict[str, Tensor]:
        """How many batches are in the statistics of normalisations, by name."""
        key = "num_batches_tracked"
        found = {
            place.name.removesuffix(place.key) + key: place.owner._buffers.get(key)
            for place in self._places
            if place.is_normalisation
        }
        return {name: count for name, count in found.items() if count is not None}

    def refuse_trained(self, names: Iterable[str]) -> None:
        """Refuse parameters that are trained from now on, and are averaged as frozen ones.

        Raises:
            ValueError: there is one.
        """
        if mine := sorted({p.name for p in self._places if p.frozen}.intersection(names)):
            raise ValueError(
                f"Parameter '{mine[0]}' is trained from now on, but EASGDStrategy(buffers=...)"
                " has a pattern for it as for a frozen one. Take the pattern out, or let it stay"
                " frozen."
            )

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`load_center` writes to, as it is in the module now, by name."""
        slices = self.values(self.center) if self else ()
        found = {slice_.name: slice_.whole.detach() for slice_, _ in slices}
        for norm in self._recomputed:
            pairs = zip(norm.names, norm.keys, strict=True)
            found |= {name: norm.owner.get_buffer(key) for name, key in pairs}
        return found

    def _present(self) -> list[Tensor | None]:
        """The module's buffers now; None for one that is not there in its shape."""
        for at, place in enumerate(self._places):
            tensor, how, _ = self._known[at]
            found = place.found()
            # Looked at anew only if it is not what it was: there may be tens of thousands.
            if found is not tensor or _place_of(found) != how:
                self._known[at] = found, _place_of(found), self._look(at, place)
        return [now for *_, now in self._known]

    def _look(self, at: int, place: Place) -> Tensor | None:
        now, shape = place.now(), self._layout.slots[at].shape
        if now is not None and as_real(now).shape == shape:
            return now
        if place.name not in self._missing:
            self._missing.add(place.name)
            _tell_missing(place, shape)
        return None

    def contribute(self, healthy: bool, *, last: bool = False) -> list[Tensor]:
        """This worker's part of the sum, as flat tensors; ``last``: its own stay as they are."""
        if not self:
            return []
        if healthy:
            for part in self.total.parts:
                part.fill_(math.nan)
            self._read(self.total)
            self._mend(last=last)
        for (place, *_), _, mine, center in self._parts():
            if healthy and (place.policy == "average" or self._rank == 0):
                _subtract_(mine, center)
            else:
                mine.zero_()
        return self.total.parts

    def _parts(self) -> Iterator[tuple[list[Place], list[int], Tensor, Tensor]]:
        """Places of one kind and their sizes, with their values in the sum and in the center."""
        lengths = [sum(sizes) for _, sizes in self._kinds]
        totals = torch.split(self.total.parts[0], lengths)
        ends = {part.dtype: 0 for part in self.center.parts}
        parts = {part.dtype: part for part in self.center.parts}
        dtypes = {slot.name: slot.dtype for slot in self._layout.slots}
        for (places, sizes), length, total in zip(self._kinds, lengths, totals, strict=True):
            dtype = dtypes[places[0].name]
            begin, ends[dtype] = ends[dtype], ends[dtype] + length
            yield places, sizes, total, parts[dtype][begin : begin + length]

    def _read(self, vector: FlatVector) -> None:
        """Read the module's buffers; what is not there stays as it is."""
        present = zip(self._present(), vector.views, strict=True)
        vector.read_([view if now is None else now for now, view in present])

    def _mend(self, *, last: bool) -> None:
        """Give up normalisations that overflowed, as where a scaler skips the step."""
        if not any(bool(_overflowed(mine, center).any()) for *_, mine, center in self._parts()):
            return
        views = list(zip(self._places, self.total.views, self.center.views, strict=True))
        mended = {
            place.owner
            for place, mine, center in views
            if place.is_normalisation and bool(_overflowed(mine, center).any())
        }
        for place, mine, center in views:
            if place.owner in mended and (buffer := place.now()) is not None:
                mine.copy_(center)
                if not last:
                    buffer.copy_(center)

    def apply(self, healthy: Sequence[bool]) -> None:
        """Take over the sum that arrived; ``healthy`` says which workers contributed."""
        for places, sizes, total, center in self._parts() if self else ():
            speakers = healthy if places[0].policy == "average" else healthy[:1]
            if any(speakers):
                moved = _move_(center, total, sum(speakers))
                if self._rank == 0 and len(healthy) > 1 and not places[0].chosen:
                    self._tell_averaged(places, sizes, moved)

    def _tell_averaged(self, places: Sequence[Place], sizes: Sequence[int], moved: Tensor) -> None:
        """Say which buffers were averaged without anybody's choice, when they begin to change."""
        if len(self._silent) == len(self._places) or not bool(moved.any()):
            return
        each = zip(places, torch.split(moved, list(sizes)), strict=True)
        new = [p.name for p, m in each if p.name not in self._silent and bool(m.any())]
        self._silent.update(new)
        if new:
            _tell_averaged(new)

    def brought(self) -> list[FlatVector]:
        """What this worker has, by what :meth:`contribute` gave; NaN where there is no mean."""
        if not self:
            return []
        values = self.center.clone()
        for value, total in zip(values.views, self.total.views, strict=True):
            value.copy_(torch.where(total.abs() < _FAR / 2, value + total, math.nan))
        return [values]

    def read_center(self) -> None:
        """Make the module's buffers those of the center."""
        if self:
            self._read(self.center)

    def values(self, vector: FlatVector) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """Each buffer with its values in the center or the sum."""
        for place, now, view in zip(self._places, self._present(), vector.views, strict=True):
            whole = place.found()
            if now is not None and whole is not None:
                yield ParameterSlice(place.name, whole), view

    def load_center(self) -> None:
        """Overwrite the module's buffers by the center's; its weights are there already."""
        if self:
            pairs = zip(self._present(), self.center.views, strict=True)
            self.center.write_to([view.clone() if now is None else now for now, view in pairs])
        for norm in self._recomputed:
            norm.recompute_()


def _place_of(tensor: Tensor | None) -> object:
    """Where a tensor's memory is and how it goes through it."""
    if tensor is None or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _order(place: Place) -> tuple[int, str, bool]:
    """Places are kept by precision, policy and whether it was chosen, each kind together."""
    now = place.now()
    assert now is not None, f"{place.name} had a mean"
    return FLAT_DTYPE[now.dtype].itemsize, place.policy, place.chosen


def _overflowed(mine: Tensor, center: Tensor) -> Tensor:
    return center.isfinite() & ~mine.isfinite()


def _subtract_(mine: Tensor, center: Tensor) -> None:
    """Replace double values by what travels of them; see [Note: constants]."""
    mine.sub_(center.nan_to_num(0, 0, 0))
    mine.masked_fill_(mine.isfinite() & (mine.abs() > _FAR / 4), math.nan)
    mine.clamp_(-_FAR, _FAR)


def _move_(center: Tensor, total: Tensor, workers: int) -> Tensor:
    """Move the center by what arrived from ``workers`` workers; see [Note: constants].

    Returns:
        Where it changed.
    """
    mean = center.nan_to_num(0, 0, 0) + total / workers
    infinite = total.abs() == workers * _FAR
    mean = torch.where(infinite, total * math.inf, mean).to(center.dtype)
    unchanged = (total == 0) & center.isfinite()
    meaningful = infinite | (total.abs() < _FAR / 2)
    moved = meaningful & ~unchanged & (mean != center)
    center.copy_(torch.where(moved, mean, center))
    return moved


def _tell_missing(place: Place, shape: tuple[int, ...]) -> None:
    buffer = place.found()
    now = "None" if buffer is None else f"{tuple(buffer.shape)}, {buffer.dtype}, {buffer.layout}"
    warnings.warn(
        f"Buffer '{place.name}' had shape {shape} and a mean when training began, and is {now} now."
        " So it is not averaged as long as that lasts: every worker has its own. If that is right,"
        f" set EASGDStrategy(buffers={{'{place.name}': 'local'}}); else let it keep its shape and"
        " precision.",
        stacklevel=2,
    )


def _tell_averaged(names: Sequence[str]) -> None:
    warnings.warn(
        f"Exchanges average the buffer(s) {listed(names, 5)} over the workers: no policy was chosen"
        " for them, and they are no statistics of torch's normalisations. If their mean means"
        " nothing (queues, codebooks, extremes, counters), let every worker keep its own:"
        f" EASGDStrategy(buffers={{'{names[0]}': 'local'}}), or take worker 0's with 'broadcast'."
        " 'average' chooses the mean, without this warning.",
        stacklevel=2,
    )
