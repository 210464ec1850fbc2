"""Elastic parameters, cut into fragments: the unit that one exchange moves.

[Note: fragments] With k fragments there are k times as many exchanges, and each moves a k-th of the
model in its turn. So the peak of traffic and the buffer of the sum are a k-th. Parameters are cut
along their first dimension, where views exist whatever the strides.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easgd.algorithms import CenterAverage, Rule, elastic
from lightning_easgd.center.flat import FlatLayout, FlatVector, Memory, Scratch, as_real, as_reals

_MOST_CUTS_PER_PARAMETER = 1024
_SMALL = 4096
"""Elements below which a call for each tensor costs more than going through memory twice."""


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter (or buffer), or some of its rows."""

    name: str
    whole: Tensor
    rows: slice | None = None
    """Along the first dimension; None for all."""

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that is laid out like the whole one; a view."""
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def tensor(self) -> Tensor:
        """The values in the module, outside of autograd; a view."""
        return self.of(self.whole.detach())

    def __str__(self) -> str:
        if self.rows is None:
            return self.name
        return f"{self.name}[{self.rows.start}:{self.rows.stop}]"


class Fragment:
    """Pieces that are exchanged together: their center, and their sum in flight.

    Args:
        slices: the center starts as a copy of them.
        memory: where the center lies.
        averaging: which running average of the center is delivered; None: the center itself.
    """

    def __init__(
        self,
        slices: Sequence[ParameterSlice],
        memory: Memory,
        averaging: CenterAverage | None = None,
    ) -> None:
        self.slices = slices
        self.layout = FlatLayout((str(slice_), slice_.tensor) for slice_ in slices)
        self.center = FlatVector(self.layout, memory.allocate(self.layout.sizes))
        self.center.read_(self.tensors())
        self._averaging = averaging
        self.delivered = self.center
        """What the module shows and is saved: the center, or its running average."""
        if averaging is not None:
            self.delivered = FlatVector(self.layout, memory.allocate(self.layout.sizes))
        self.forget()
        self._total: FlatVector | None = None
        self._scratch: Scratch | None = None
        self.group: FlatVector | None = None
        """The center of this worker's group, which then takes part in exchanges in its place."""

    def forget(self) -> None:
        """Begin as if there had been no exchange yet."""
        self.forget_rule_state()
        self.begin_average(0)

    def forget_rule_state(self) -> None:
        """Let the update rule begin anew; the running average, if there is one, goes on."""
        self.rule_state: list[dict[str, Any]] = [{} for _ in self.center.parts]
        """What the update rule keeps of each flat tensor of the center."""

    def begin_average(self, moves: int) -> None:
        """Let the running average, if there is one, be the center, as after ``moves`` moves."""
        self.moves = moves
        """How often the center has moved, as far as the average knows."""
        if self._averaging is not None:
            torch._foreach_copy_(self.delivered.parts, self.center.parts)

    def follow_center(self) -> None:
        """Let the running average, if there is one, take in the center, which has moved."""
        if self._averaging is not None:
            self.moves += 1
            self._averaging.follow_(self.delivered.parts, self.center.parts, self.moves)

    @property
    def name(self) -> str:
        """Unlike that of any other fragment of the module."""
        return f"{self.slices[0]} to {self.slices[-1]}"

    @property
    def total(self) -> FlatVector:
        """The sum in flight, in memory that fragments share; see Center."""
        assert self._total is not None, "the fragment has no sum now"
        return self._total

    @total.setter
    def total(self, total: FlatVector | None) -> None:
        self._total = total

    def copy_of_total(self) -> FlatVector:
        """This worker's difference, or what is sent of it; for :meth:`pull`, before the next."""
        if not self._has_small_tensors:
            return self.total.clone()
        if self._scratch is None:
            self._scratch = Scratch(self.total)
        self._scratch.fill_(self.total)
        return self._scratch

    def lost_by(self, rule: Rule) -> FlatVector:
        """What the rule lets a worker lose whose x - c is in the total; for :meth:`pull`."""
        lost = self.copy_of_total()
        for part, center, state in zip(lost.parts, self.center.parts, self.rule_state, strict=True):
            rule.pull_(part, center=center, state=state)
        return lost

    def pull(self, vector: FlatVector) -> None:
        """Subtract what is lost, for once, from what takes part in exchanges."""
        vector.subtract_from(self.brought())
        if isinstance(vector, Scratch):
            vector.release()

    def tensors(self) -> list[Tensor]:
        """What the module has: its parameters, or views on some of their rows."""
        return [p.whole if p.rows is None else p.tensor for p in self.slices]

    def brought(self) -> list[Tensor]:
        """What takes part in exchanges: what the module has, or views on the group's center."""
        return self.tensors() if self.group is None else self.group.views

    def load_rule_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what a checkpoint holds of :attr:`rule_state`."""
        for part, mine, saved in zip(self.center.parts, self.rule_state, state, strict=True):
            for key, value in saved.items():
                flat = isinstance(value, Tensor) and value.shape == part.shape
                mine[key] = value.to(part.device) if flat else value

    def reset_to_center(self, mixing_rate: float) -> None:
        """Move the module's weights x to the center c: x <- κ x + (1 - κ) c.

        Args:
            mixing_rate: κ, in [0, 1); 0 takes them all the way.
        """
        if mixing_rate:
            self.center.mix_into(self.tensors(), 1 - mixing_rate)
        else:
            self.center.write_to(self.tensors())

    @torch.no_grad()
    def take_difference(self, *, from_start: bool) -> None:
        """Put x - c in the sum's place; x is what takes part in exchanges.

        Args:
            from_start: whether c is the center as parameters hold it, in their own precision, from
                where a restart began them.
        """
        brought = as_reals(self.brought())
        centers = self.center.views
        rounded = {x.dtype for x in brought} - self.layout.sizes.keys()
        if from_start and rounded:
            pairs = zip(centers, brought, strict=True)
            centers = [view.to(tensor.dtype).to(view.dtype) for view, tensor in pairs]
        elif rounded or self._has_small_tensors:
            self.total.read_(brought)
            torch._foreach_sub_(self.total.parts, self.center.parts)
            return
        elastic.difference(brought, centers, self.total.views)

    @property
    def _has_small_tensors(self) -> bool:
        return sum(self.layout.sizes.values()) < _SMALL * len(self.slices)

    def values(self, vector: FlatVector) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """Each piece with its values in the center or the sum."""
        return zip(self.slices, vector.views, strict=True)


class ParameterCohort:
    """Parameters that joined the elastic set together.

    Args:
        named: names and parameters.
        fragments: into which they are cut.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], fragments: Sequence[Fragment]
    ) -> None:
        self.named = list(named)
        self.fragments = list(fragments)

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [name for name, _ in self.named]

    def resume_average(self, moves: Sequence[int]) -> None:
        """Begin the running averages, if there are any, at the center, as after so many moves.

        Args:
            moves: of each fragment; where there were other fragments, the fewest count for all.
        """
        if len(moves) != len(self.fragments):
            moves = [min(moves)] * len(self.fragments)
        for fragment, count in zip(self.fragments, moves, strict=True):
            fragment.begin_average(count)


def make_fragments(
    named: Sequence[tuple[str, nn.Parameter]],
    count: int,
    memory: Memory,
    averaging: CenterAverage | None = None,
) -> list[Fragment]:
    """Cut parameters into ``count`` fragments, as :func:`cut`, with centers of their own.

    Args:
        named: names and parameters.
        count: of fragments.
        memory: where their centers lie.
        averaging: as of Fragment.
    """
    return [Fragment(slices, memory, averaging) for slices in cut(named, count)]


def cut(named: Sequence[tuple[str, nn.Parameter]], fragments: int) -> list[list[ParameterSlice]]:
    """Cut parameters into fragments of about equal size, in order; no row is in two.

    Args:
        named: names and parameters, all elements of which the fragments cover.
        fragments: how many; fewer if there are fewer places to cut, none without parameters.
    """
    if not named:
        return []
    places = list(_places(named))
    fragments = min(fragments, max(1, len(places)))
    total = places[-1] if places else 0
    ends, last = [], -1
    for number in range(1, fragments):
        near = bisect_left(places, total * number // fragments)
        last = min(max(near, last + 1), len(places) - 1 - (fragments - number))
        ends.append(places[last])
    cuts = [0, *ends, total]
    return [_slices(named, cuts[i], cuts[i + 1], last=i == fragments - 1) for i in range(fragments)]


def _places(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[int]:
    """Where the elements may be cut, in ascending order, the end included."""
    begin = 0
    for _, parameter in named:
        rows, size = _rows(parameter)
        step = math.ceil(rows / _MOST_CUTS_PER_PARAMETER) if size else 1
        if size:
            yield from (begin + row * size for row in range(step, rows, step))
            yield begin + rows * size
        begin += rows * size


def _rows(parameter: Tensor) -> tuple[int, int]:
    """How many rows a parameter has, and how many elements each."""
    numel = parameter.numel()
    rows = parameter.shape[0] if parameter.dim() and numel else 1
    return rows, numel // rows


def _slices(
    named: Sequence[tuple[str, nn.Parameter]], start: int, stop: int, *, last: bool
) -> list[ParameterSlice]:
    """What lies between two places; empty parameters are in the fragment that follows them."""
    slices, begin = [], 0
    for name, parameter in named:
        rows, size = _rows(parameter)
        end = begin + rows * size
        if not size:
            if start <= begin and (begin < stop or last):
                slices.append(ParameterSlice(name, parameter))
        elif start <= begin and end <= stop:
            slices.append(ParameterSlice(name, parameter))
        elif begin < stop and start < end:
            first, behind = max(start - begin, 0) // size, min(stop - begin, rows * size) // size
            slices.append(ParameterSlice(name, parameter, slice(first, behind)))
        begin = end
    return slices


def put_together(values: Iterable[tuple[ParameterSlice, Tensor]]) -> dict[str, Tensor]:
    """Tensors of slices' values, whole and in the values' own precision, by name."""
    wholes: dict[str, Tensor] = {}
    for slice_, view in values:
        if slice_.name not in wholes:
            wholes[slice_.name] = torch.empty_like(as_real(slice_.whole.detach()), dtype=view.dtype)
        slice_.of(wholes[slice_.name]).copy_(view)
    return wholes


def put_together_like(values: Iterable[tuple[ParameterSlice, Tensor]]) -> dict[str, Tensor]:
    """The same as the module has them: in their precision, and complex if they are."""
    wholes: dict[str, Tensor] = {}
    for slice_, view in values:
        whole = wholes.setdefault(slice_.name, torch.empty_like(slice_.whole.detach()))
        slice_.of(as_real(whole)).copy_(view)
    return wholes
