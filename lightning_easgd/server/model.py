"""The flat layout of a model, as it is described to others and compared with theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.refusal import Refusal, Refused

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Precisions of a center, which is float32 for parameters in half precision."""

Description = Sequence[Sequence[Any]]
"""Of each tensor: its name, its shape and its precision in the center."""


def precision(dtype: torch.dtype) -> str:
    """A precision as plain data, for example "float32"."""
    return str(dtype).removeprefix("torch.")


def describe(layout: FlatLayout) -> list[list[Any]]:
    """A layout as plain data."""
    return [[slot.name, list(slot.shape), precision(slot.dtype)] for slot in layout.slots]


def layout_of(description: Any, most_bytes: int) -> FlatLayout:
    """The inverse of :func:`describe`, for a description that came from anywhere.

    Raises:
        Refused: it is none, or of a larger model than allowed.
    """
    if not isinstance(description, list) or not description:
        raise _malformed("it names no parameters")
    tensors = [_tensor(entry, most_bytes) for entry in description]
    if len({name for name, _ in tensors}) < len(tensors):
        raise _malformed("two parameters have one name")
    size = sum(tensor.nbytes for _, tensor in tensors)
    if size > most_bytes:
        raise Refused(
            Refusal.TOO_LARGE,
            f"The model has {size} bytes. Allowed: {most_bytes}. If it is yours, raise the server's"
            " most_bytes.",
        )
    return FlatLayout(tensors)


def _tensor(entry: Any, most_bytes: int) -> tuple[str, Tensor]:
    match entry:
        case [str(name), list(shape), "float32" | "float64" as dtype]:
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise _malformed(f"{name!r:.80} has no shape")
            if math.prod(max(1, extent) for extent in shape) > most_bytes:
                raise _malformed(f"{name!r:.80} is too large")
            return name, torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
    raise _malformed("a parameter has no name, shape or precision")


def _malformed(what: str) -> Refused:
    return Refused(
        Refusal.MALFORMED,
        f"The description of the model is none: {what}. Allowed: a list with the name, the shape"
        " and the precision, float32 or float64, of each parameter.",
    )


def require_same_model(theirs: FlatLayout, ours: FlatLayout) -> None:
    """Check that a worker has the model of the server.

    Raises:
        Refused: it has another one; the message names the first parameter that differs.
    """
    if theirs.slots == ours.slots:
        return
    for place, (their, our) in enumerate(zip(theirs.slots, ours.slots, strict=False)):
        for what in ("name", "shape", "dtype"):
            given, known = getattr(their, what), getattr(our, what)
            if given != known:
                raise Refused(
                    Refusal.OTHER_MODEL,
                    f"This worker has another model than the server: parameter {place},"
                    f" {_shown(their.name)}, has the {what} {_shown(given)}, and there"
                    f" {_shown(our.name)} has {_shown(known)}. Give all workers of this server the"
                    " same model.",
                )
    longer, has = max((theirs, "this worker"), (ours, "the server"), key=lambda e: len(e[0].slots))
    extra = longer.slots[min(len(theirs.slots), len(ours.slots))].name
    raise Refused(
        Refusal.OTHER_MODEL,
        f"This worker has {len(theirs.slots)} parameters and the server {len(ours.slots)}: only"
        f" {has} has {_shown(extra)}. Give all workers of this server the same model.",
    )


def _shown(value: object) -> str:
    """What a worker may have sent, so that it does nothing in a terminal or a log."""
    return f"{value!r:.80}"


def vector_on(layout: FlatLayout, memory: Tensor) -> FlatVector:
    """A flat vector whose values lie in ``memory``, of dtype uint8, part after part.

    Raises:
        Refused: the memory has another size than the vector.
    """
    if memory.numel() != byte_size(layout):
        raise Refused(
            Refusal.MALFORMED,
            f"A vector of this model has {byte_size(layout)} bytes, and {memory.numel()} came."
            " Give all workers of this server the same model and the same version.",
        )
    parts: dict[torch.dtype, Tensor] = {}
    begin = 0
    for dtype in _wire_order(layout):
        end = begin + layout.sizes[dtype] * dtype.itemsize
        parts[dtype] = memory[begin:end].view(dtype)
        begin = end
    return FlatVector(layout, parts)


def vectors_on(layout: FlatLayout, memory: Tensor, count: int) -> list[FlatVector]:
    """So many vectors, one after the other; raises as :func:`vector_on`."""
    size = byte_size(layout)
    return [vector_on(layout, memory[k * size : (k + 1) * size]) for k in range(count)]


def bytes_of(vector: FlatVector) -> list[memoryview]:
    """The memory of a vector in host memory, part after part; the inverse of :func:`vector_on`."""
    parts = {part.dtype: part for part in vector.parts}
    order = _wire_order(vector.layout)
    return [parts[dtype].view(torch.uint8).numpy().data for dtype in order]


def _wire_order(layout: FlatLayout) -> list[torch.dtype]:
    """The longest elements first, so that each part begins at a multiple of its elements' size."""
    return sorted(layout.sizes, key=lambda dtype: -dtype.itemsize)


def byte_size(layout: FlatLayout) -> int:
    """Bytes of a flat vector."""
    return sum(size * dtype.itemsize for dtype, size in layout.sizes.items())


def parts_by_name(prefix: str, vector: FlatVector) -> dict[str, Tensor]:
    """The flat buffers of a vector, as a file has them."""
    return {f"{prefix}.{precision(p.dtype)}": p for p in vector.parts}


def vector_from(prefix: str, layout: FlatLayout, tensors: Mapping[str, Tensor]) -> FlatVector:
    """The inverse of :func:`parts_by_name`.

    Raises:
        KeyError: a part is missing.
    """
    names = {dtype: f"{prefix}.{precision(dtype)}" for dtype in layout.sizes}
    return FlatVector(layout, {dtype: tensors[name].clone() for dtype, name in names.items()})
