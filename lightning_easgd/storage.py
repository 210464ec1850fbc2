"""Which elements of memory a tensor covers: views, expanded tensors, tensors without memory."""

from __future__ import annotations

import torch
from torch import Tensor


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
    places = torch.tensor([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * torch.arange(size)).flatten()
    return places
