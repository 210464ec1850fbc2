"""Copies of what shares memory with a module, wherever it stands in a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_easgd.center.storage import is_plain


class Aliases:
    """Finds what shares memory with certain tensors, and copies it; all the rest stays as it is.

    Copies share memory with each other where the originals did, so that a file is no larger.

    Args:
        tensors: whose memory is looked for.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def copied(self, value: Any) -> Any:
        """The value, or a copy of it where it, or something inside it, shares the memory."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            inside = [*value.parameters(), *value.buffers()]
            return copy.deepcopy(value) if any(map(self._shares, inside)) else value
        if isinstance(value, Mapping):
            return self._container(value, value.items())
        if isinstance(value, list):
            return self._container(value, enumerate(value))
        if isinstance(value, tuple):
            items = [self.copied(item) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            if same:
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self._array(value)

    def _container(self, value: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        changed = [(k, new) for k, old in items if (new := self.copied(old)) is not old]
        if not changed:
            return value
        twin = copy.copy(value)  # the original may be something that lives on
        for key, item in changed:
            twin[key] = item
        return twin

    def _shares(self, tensor: Tensor) -> bool:
        return is_plain(tensor) and tensor.untyped_storage().data_ptr() in self._storages

    def _tensor(self, tensor: Tensor) -> Tensor:
        if not self._shares(tensor):
            return tensor
        detached = tensor.detach()
        if type(detached) is not Tensor or detached.is_conj() or detached.is_neg():
            return tensor.detach().clone()
        storage = detached.untyped_storage()
        if storage.data_ptr() not in self._copies:
            self._copies[storage.data_ptr()] = copy.copy(storage)
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        memory = self._copies[storage.data_ptr()]
        twin.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, tensor.requires_grad)
        return twin

    def _array(self, value: Any) -> Any:
        """A NumPy array may be a view of a tensor."""
        interface = getattr(value, "__array_interface__", None)
        if not isinstance(interface, Mapping) or interface.get("data") is None:
            return value
        at = interface["data"][0]
        inside = any(ptr <= at < ptr + s.nbytes() for ptr, s in self._storages.items())
        return value.copy() if inside else value
