"""Whether two nests of tensors hold the same, without keeping both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(content: Any) -> tuple[int, str]:
    """Bytes of all tensors in a nest of dictionaries and sequences, and a digest of the nest.

    Taken of the content, not of a file, so that it holds for every storage.
    """
    digest = hashlib.sha256()
    return _digest(content, digest), digest.hexdigest()


def _digest(node: Any, digest: Any) -> int:
    if isinstance(node, Tensor):
        dense = node.detach().to_dense() if node.layout != torch.strided else node.detach()
        values = dense.cpu().contiguous().reshape(-1)
        digest.update(f"tensor {node.dtype} {tuple(node.shape)};".encode())
        digest.update(values.view(torch.uint8).numpy().data)
        return values.nbytes
    if isinstance(node, Mapping):
        digest.update(f"mapping {len(node)};".encode())
        return sum(_digest(key, digest) + _digest(value, digest) for key, value in node.items())
    if isinstance(node, list | tuple):
        digest.update(f"sequence {len(node)};".encode())
        return sum(_digest(value, digest) for value in node)
    plain = isinstance(node, str | bytes | int | float | bool | None)
    digest.update(f"{type(node).__name__} {node!r};".encode() if plain else b"object;")
    return 0
