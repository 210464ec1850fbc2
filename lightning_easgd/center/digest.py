"""Whether tensors hold the same, on two workers or at two times, without keeping both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.storage import as_bytes

_BYTES = 2**22
_WORDS = 2**18
"""How many bytes, or words of 32 bits, are read at once."""


def fingerprint(content: Any) -> tuple[int, str]:
    """Bytes of all tensors in a nest of dictionaries and sequences, and a digest of the nest.

    Taken of the content, not of a file, so that it holds for every storage.
    """
    digest = hashlib.sha256()
    return _digest(content, digest), digest.hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checksum of each tensor, computed where it lies; against chance, not against attackers."""
    sums = {name: _checksum(tensor.detach()) for name, tensor in tensors.items()}
    here = {name: value for name, value in sums.items() if isinstance(value, Tensor)}
    return sums | {name: int(value) for name, value in here.items()}


def _digest(node: Any, digest: Any) -> int:
    if isinstance(node, Tensor):
        dense = node.detach().to_dense() if node.layout != torch.strided else node.detach()
        dense = dense.dequantize() if dense.is_quantized else dense
        digest.update(f"tensor {node.dtype} {tuple(node.shape)};".encode())
        for chunk in _byte_chunks(dense):
            digest.update(chunk)
        return int(dense.nbytes)
    if isinstance(node, Mapping):
        digest.update(f"mapping {len(node)};".encode())
        return sum(_digest(key, digest) + _digest(value, digest) for key, value in node.items())
    if isinstance(node, list | tuple):
        digest.update(f"sequence {len(node)};".encode())
        return sum(_digest(value, digest) for value in node)
    plain = isinstance(node, str | bytes | int | float | bool | None)
    digest.update(f"{type(node).__name__} {node!r};".encode() if plain else b"object;")
    return 0


def _byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The values of a plain tensor, some megabytes at a time.

    They are copied: a storage that NumPy has seen can never be resized again, as modules may do.
    """
    for chunk in torch.split(as_bytes(tensor), _BYTES):
        yield torch.empty(chunk.shape, dtype=chunk.dtype, device="cpu").copy_(chunk).numpy().data


def _checksum(tensor: Tensor) -> Tensor | str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return fingerprint(tensor)[1]
    data = as_bytes(tensor)
    data = data.clone() if data.data_ptr() % 4 else data
    whole = data.numel() // 4 * 4
    total = torch.tensor(tensor.numel(), device=data.device)
    for words in (data[:whole].view(torch.int32), data[whole:]):
        for chunk in torch.split(words, _WORDS):
            # Weighted by place: what a queue holds may only have moved on.
            total = total * 1_000_003 + (_weights(data.device)[: chunk.numel()] * chunk).sum()
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    limits = torch.iinfo(torch.int64)
    weights = torch.randint(limits.min, limits.max, (_WORDS,), generator=generator, device="cpu")
    return weights.bitwise_or(1).to(device)
