"""Elastic parameters, cut into fragments: the unit that one exchange moves.

[Note: fragments] With k fragments there are k times as many exchanges, and each moves a k-th of the
model in its turn. So the peak of traffic and the buffer of the sum are a k-th. Parameters are cut
along their first dimension, where views exist whatever the strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easgd.algorithms import CenterAverage, Rule, elastic
from lightning_easgd.center.flat import FlatLayout, FlatVector, Memory, Scratch, as_real, as_reals
from lightning_easgd.center.slices import ParameterSlice, cut

_PIECE = 2**18
"""Elements of large vectors that are looked at together, for they fit into a processor's cache."""
_SMALL = 4096
"""Elements below which a call for each tensor costs more than going through memory twice."""


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
        self.start: FlatVector | None
        """Where the worker stood after its latest exchange, as its parameters hold it, if the rule
        counts differences from there; None: at the center, or the rule does not."""
        self.group: FlatVector | None = None
        """The center of this worker's group, which then takes part in exchanges in its place."""

    def forget(self) -> None:
        """Begin as if there had been no exchange yet."""
        self.forget_rule_state()
        self.begin_average(0)

    def forget_rule_state(self) -> None:
        """Let the update rule begin anew; the running average, if there is one, goes on."""
        self.start = None
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
        """What the rule lets a worker lose whose difference is in the total; for :meth:`pull`."""
        lost = self.copy_of_total()
        start = self.own_start() if rule.from_own_start else self.center
        parts = zip(lost.parts, self.center.parts, start.parts, self.rule_state, strict=True)
        for part, center, begin, state in parts:
            rule.pull_(part, center=center, start=begin, state=state)
        if rule.from_own_start:
            torch._foreach_add_(start.parts, self.total.parts)
            torch._foreach_sub_(start.parts, lost.parts)
            self._round(start)
        return lost

    def own_start(self) -> FlatVector:
        """:attr:`start`, and from now on no longer the center."""
        if self.start is None:
            self.start = self.center.clone()
            self._round(self.start)
        return self.start

    def _round(self, vector: FlatVector) -> None:
        """Give a vector the values that parameters can have in their own precision."""
        if self._rounded(brought := as_reals(self.brought())):
            vector.read_(_as_held(vector.views, brought))

    def _rounded(self, brought: Sequence[Tensor]) -> bool:
        """Whether parameters have a lower precision than the center."""
        return bool({x.dtype for x in brought} - self.layout.sizes.keys())

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
        """Put x - c, or x - s, in the sum's place; x is what takes part in exchanges.

        Args:
            from_start: whether c is the center as parameters hold it, in their own precision, from
                where a restart began them.
        """
        brought = as_reals(self.brought())
        begin = self.center if self.start is None else self.start
        views, rounded = begin.views, self._rounded(brought)
        if from_start and rounded:
            views = _as_held(views, brought)
        elif rounded or self._has_small_tensors:
            self.total.read_(brought)
            torch._foreach_sub_(self.total.parts, begin.parts)
            return
        elastic.difference(brought, views, self.total.views)

    def distance(self) -> float:
        """‖x - c‖ of the worker whose difference is in the total."""
        if self.start is None:
            return self.total.norm()
        parts = zip(self.total.parts, self.start.parts, self.center.parts, strict=True)
        return math.hypot(*(_norm_of_moved(*each) for each in parts))

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


def _norm_of_moved(u: Tensor, s: Tensor, c: Tensor) -> float:
    """‖u + s - c‖, without a copy of any."""
    pieces = zip(*(torch.split(vector, _PIECE) for vector in (u, s, c)), strict=True)
    sizes = [torch.linalg.vector_norm(u + s - c) for u, s, c in pieces]
    return float(torch.linalg.vector_norm(torch.stack(sizes)))


def _as_held(views: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views with the values that tensors would hold in their own precision."""
    pairs = zip(views, tensors, strict=True)
    return [view.to(tensor.dtype).to(view.dtype) for view, tensor in pairs]


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
