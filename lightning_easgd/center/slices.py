"""Parameters, or some of their rows, and how a model is cut into about equal parts of them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_MOST_CUTS_PER_PARAMETER = 1024


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
