"""Which elements of memory a tensor covers: views, expanded tensors, tensors without memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import Enum
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has strides and values, unlike sparse, quantized and meta tensors."""
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)


def compact(tensor: Tensor) -> Tensor:
    """A view of a plain tensor without the copies that ``expand`` makes of its elements."""
    if tensor.is_contiguous():
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a plain tensor lie at one place in memory."""
    if tensor.is_contiguous():
        return False
    reach = 0
    dims = ((st, size) for st, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for stride, size in sorted(dims):
        if stride <= reach:
            return len(torch.unique(places(tensor))) < tensor.numel()
        reach += stride * (size - 1)
    return False


def places(tensor: Tensor) -> Tensor:
    """Where in its storage each element of a plain tensor lies, in elements; a flat tensor."""
    places = torch.tensor([tensor.storage_offset()], device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return places


class Shares(Enum):
    """What two tensors have in common of their memory."""

    NOTHING = "nothing"
    PART = "part"
    ALL = "all"


def storage_of(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Equal for tensors that lie in one storage; None for those that have no memory."""
    if not is_plain(tensor) or hasattr(tensor, "__tensor_flatten__") or not tensor.numel():
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


def shares(one: Tensor, other: Tensor) -> Shares:
    """What two plain tensors in one storage have in common."""
    one, other = compact(one.detach()), compact(other.detach())
    (begin, end), (start, stop) = _span(one), _span(other)
    if end <= start or stop <= begin:
        return Shares.NOTHING
    if one.dtype != other.dtype:
        return Shares.PART
    if one.nbytes == end - begin and other.nbytes == stop - start:
        return Shares.ALL if (begin, end) == (start, stop) else Shares.PART
    mine, theirs = torch.unique(places(one)), torch.unique(places(other))
    if torch.equal(mine, theirs):
        return Shares.ALL
    return Shares.PART if bool(torch.isin(mine, theirs).any()) else Shares.NOTHING


class Neighbours(Generic[Item]):
    """Tensors by where they lie: many thousands may be views of one storage."""

    def __init__(self) -> None:
        self._known: dict[object, list[tuple[int, int, Item]]] = {}
        self._longest: dict[object, int] = {}

    def add(self, tensor: Tensor, item: Item) -> None:
        """Take in a tensor, as ``item``."""
        key, begin, end = _place(tensor)
        known = self._known.setdefault(key, [])
        insort(known, (begin, len(known), item))
        self._longest[key] = max(end - begin, self._longest.get(key, 0))

    def of(self, tensor: Tensor) -> list[Item]:
        """What was taken in of all that shares memory with this one, and perhaps of some more."""
        key, begin, end = _place(tensor)
        known = self._known.get(key, [])
        first = bisect_left(known, (begin - self._longest.get(key, 0),))
        return [item for *_, item in known[first : bisect_left(known, (end,))]]


def _place(tensor: Tensor) -> tuple[object, int, int]:
    """The storage of a tensor, and where in it that begins and ends; itself if it has no memory."""
    key = storage_of(tensor)
    return (id(tensor), 0, 1) if key is None else (key, *_span(compact(tensor.detach())))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends, in bytes."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    begin = int(tensor.storage_offset())
    end = begin + sum((size - 1) * stride for size, stride in sizes) + 1
    return begin * tensor.itemsize, end * tensor.itemsize


def seen_from(to: Tensor, like: Tensor, values: Tensor) -> Tensor:
    """Values in the places of ``like``, in the shape of ``to``, which shares all of its memory."""
    begin = min(to.storage_offset(), like.storage_offset())
    _, end = _span(like)
    memory = values.new_empty(end // like.itemsize - begin)
    memory.as_strided(like.shape, like.stride(), like.storage_offset() - begin).copy_(values)
    return memory.as_strided(to.shape, to.stride(), to.storage_offset() - begin)


def as_bytes(tensor: Tensor) -> Tensor:
    """The values of a plain tensor; a view if it is contiguous, else a copy."""
    values = tensor.resolve_conj().resolve_neg().contiguous()
    if values.numel() == 1:  # its strides may be anything
        values = values.clone(memory_format=torch.contiguous_format)
    return values.view(-1).view(torch.uint8)


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a plain tensor's elements, which are no complex numbers; a view."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def components(tensor: Tensor) -> list[Tensor]:
    """Plain tensors without repeated elements, which say all that a tensor does.

    Raises:
        TypeError: it is of a kind whose values cannot be read.
    """
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in components(getattr(tensor, name))]
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            numbers = tensor.q_scale(), tensor.q_zero_point()
            scale = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            return [tensor.int_repr(), scale]
        scales = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [tensor.int_repr(), *scales]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout is torch.strided:
        return [compact(tensor)]
    raise TypeError(f"Tensors of layout {tensor.layout} cannot be compared between workers.")
