"""Parameters that are one memory under several names: exchanged once.

[Note: twins] Parameters that are tied as one object have one name, and one gradient. Others share
only the storage: ``decoder.weight = nn.Parameter(encoder.weight.t())``. Each of them has gradients
and optimizer state of its own, but there is one value, which is pulled once. It goes by the name of
the first that is trained; the others are its twins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from lightning_easgd.center.slices import ParameterSlice
from lightning_easgd.center.storage import (
    Neighbours,
    Shares,
    compact,
    is_plain,
    overlaps_itself,
    seen_from,
    shares,
    storage_of,
)

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Twin(ParameterSlice):
    """A piece of a parameter, whose values lie in memory as another parameter has them."""

    first: Tensor | None = None
    """The parameter that the twin's memory is exchanged as."""

    @override
    def of(self, tensor: Tensor) -> Tensor:
        """What is laid out like the twin, as the rows of the first; a copy."""
        assert self.first is not None
        seen = seen_from(self.first, self.whole, tensor)
        return seen if self.rows is None else seen[self.rows]


class Ties:
    """The parameters that take part in exchanges, each memory once."""

    def __init__(self) -> None:
        self._firsts: Neighbours[Named] = Neighbours()
        self._twins: dict[int, list[Named]] = {}

    def add(self, named: Iterable[Named]) -> list[Named]:
        """Take in parameters that are trained from now on; those that are no twins.

        Raises:
            ValueError: one shares a part of its memory with another, or with itself.
            TypeError: one is sparse.
        """
        return [(name, parameter) for name, parameter in named if self._add(name, parameter)]

    def _add(self, name: str, parameter: nn.Parameter) -> bool:
        if not is_plain(parameter):
            kind = "meta" if parameter.is_meta else str(parameter.layout).removeprefix("torch.")
            raise TypeError(
                f"Parameter '{name}' is a {kind} tensor, which cannot be averaged. Freeze it"
                " (requires_grad=False), register it as a buffer, or make it dense."
            )
        if storage_of(parameter) is None:
            return True
        if overlaps_itself(parameter):
            raise ValueError(
                f"Several elements of parameter '{name}', of shape {tuple(parameter.shape)}, are"
                " one number in memory, so that neither an optimizer nor an exchange can move each"
                f" of them. Register what it was expanded from, {tuple(compact(parameter).shape)},"
                " and expand that in forward()."
            )
        for other, first in self._firsts.of(parameter):
            how = shares(first, parameter)
            if how is Shares.ALL:
                self._twins.setdefault(id(first), []).append((name, parameter))
                return False
            if how is Shares.PART:
                raise ValueError(
                    f"Parameters '{other}' {tuple(first.shape)} and '{name}'"
                    f" {tuple(parameter.shape)} share a part of their memory, so that it would be"
                    " pulled twice. Register one of them only, and take the other in forward() as"
                    " a view of it; or freeze one (requires_grad=False)."
                )
        self._firsts.add(parameter, (name, parameter))
        return True

    def twins(self) -> list[Named]:
        """Of all that take part."""
        return [twin for twins in self._twins.values() for twin in twins]

    def twins_of(self, parameters: Iterable[Tensor]) -> list[nn.Parameter]:
        """Of some that take part."""
        return [twin for p in parameters for _, twin in self._twins.get(id(p), ())]

    def strongest(self, alphas: dict[int, float]) -> dict[int, float]:
        """Numbers by a parameter's identity, the largest of its own and its twins' for each."""
        if not self._twins:
            return alphas
        found = alphas.copy()
        for first, twins in self._twins.items():
            known = [alphas[key] for key in (first, *(id(p) for _, p in twins)) if key in alphas]
            if known:
                found[first] = max(known)
        return found

    def points(
        self, points: Iterable[tuple[ParameterSlice, Tensor]]
    ) -> Iterator[tuple[ParameterSlice, Tensor]]:
        """The twins of slices, with the values of these."""
        for slice_, point in points if self._twins else ():
            for name, twin in self._twins.get(id(slice_.whole), ()):
                yield Twin(name, twin, slice_.rows, slice_.whole), point
