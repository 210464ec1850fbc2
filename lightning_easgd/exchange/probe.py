"""A few elements of every tensor, to notice cheaply that one was written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_easgd.center.flat import as_real
from lightning_easgd.center.storage import as_integers, is_plain

_ELEMENTS = 4
"""Of each tensor, spread over its memory."""
_ROUNDING = 64
"""By how many units in the last place a number moves that is only rounded again and again."""


@dataclass(frozen=True)
class Sample:
    """What was found."""

    elements: list[Tensor]
    """By device and precision."""
    sizes: list[list[int]]
    """How many of each tensor."""
    numbers: list[list[int]]
    """Which of the tensors they are of."""

    def differing(self, later: Sample) -> list[int]:
        """Numbers of the tensors that have other, finite values in a later sample of them."""
        return sorted(self._compared(later, _other_bits))

    def moved(self, later: Sample) -> list[int]:
        """Numbers of the tensors whose elements moved by more than rounding."""
        return sorted(self._compared(later, _moved))

    def _compared(self, later: Sample, differ: Callable[[Tensor, Tensor], bool]) -> set[int]:
        found = set()
        groups = zip(self.elements, later.elements, self.sizes, self.numbers, strict=True)
        for before, after, sizes, numbers in groups:
            if differ(before, after):
                parts = zip(torch.split(before, sizes), torch.split(after, sizes), strict=True)
                found |= {n for n, (a, b) in zip(numbers, parts, strict=True) if differ(a, b)}
        return found


def _other_bits(before: Tensor, after: Tensor) -> bool:
    before, after = as_real(before), as_real(after)
    other = as_integers(before) != as_integers(after)
    return bool((other & after.isfinite()).any())  # others have a warning of their own


def _moved(before: Tensor, after: Tensor) -> bool:
    if not before.is_floating_point():
        return _other_bits(before, after)
    tolerance = _ROUNDING * torch.finfo(before.dtype).eps
    far = (after - before).abs() > tolerance * torch.maximum(before.abs(), after.abs())
    return bool(far.any())


def sample(tensors: Sequence[Tensor]) -> Sample:
    """Look at tensors with few calls; nothing is copied from a device, and none is awaited."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for number, tensor in enumerate(tensors):
        if is_plain(tensor) and tensor.numel():
            data = tensor.detach()
            groups.setdefault((data.device, data.dtype), []).append((number, data))
    elements, sizes, numbers = [], [], []
    for members in groups.values():
        few = [_few(data) for _, data in members]
        elements.append(torch.cat(few))
        sizes.append([len(each) for each in few])
        numbers.append([number for number, _ in members])
    return Sample(elements, sizes, numbers)


def _few(data: Tensor) -> Tensor:
    span = 1 + sum((n - 1) * s for n, s in zip(data.shape, data.stride(), strict=True))
    count = min(_ELEMENTS, span)
    return data.as_strided((count,), (max(1, span // count),))
