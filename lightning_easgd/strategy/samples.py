"""How many samples a batch has, for a server that weights differences by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def samples_in(batch: Any) -> int:
    """The length of the first tensor in a batch; 1 if there is none, or it has no length."""
    return next((len(each) for each in _tensors(batch) if each.ndim), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
