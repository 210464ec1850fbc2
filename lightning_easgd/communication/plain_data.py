"""Plain data on the wire: numbers, texts, tensors, lists and dictionaries of them; never code.

[Note: nothing runs] Whoever reaches the port where workers meet can send what a worker would.
pickle may run anything, so it reads nothing that came from the network. A message is a text in
JSON, which names every kind of container, and then the bytes of tensors. Reading it makes objects
of the few types that are listed here, or fails.
"""

from __future__ import annotations

import json
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.storage import as_bytes
from lightning_easgd.communication.header import ExchangeError

MOST_BYTES = 2**24
"""Of a small message, one of a worker about itself."""

_STATE_COPIES = 256  # L-BFGS keeps two hundred
_ALIGNMENT = 16
_START = 8
"""Bytes that say how long the text is."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.complex128, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def pack(value: Any) -> Tensor:
    """A value as bytes, of dtype uint8 in host memory.

    Args:
        value: None, bool, int, float, str, a dense tensor; a list, tuple, dict or Counter of these.

    Raises:
        TypeError: there is something else in it.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_written(value, tensors), separators=(",", ":")).encode()
    content = len(text).to_bytes(_START, "little") + text
    padded = bytearray(content + bytes(-len(content) % _ALIGNMENT))
    pieces = [torch.frombuffer(padded, dtype=torch.uint8)]
    for tensor in tensors:
        data = as_bytes(tensor.detach().cpu())
        pieces += [data, data.new_zeros(-data.numel() % _ALIGNMENT)]
    return torch.cat(pieces)


def unpack(data: Tensor) -> Any:
    """The inverse of :func:`pack`; tensors in it have memory of their own.

    Raises:
        ValueError: it was not made by :func:`pack`.
    """
    try:
        length = int.from_bytes(bytes(data[:_START].tolist()), "little")
        if not 0 <= length <= data.numel() - _START:
            raise ValueError("it is cut short")
        node = json.loads(data[_START : _START + length].numpy().tobytes())
        reader = _Tensors(data[_START + length + -(_START + length) % _ALIGNMENT :])
        return _read(node, reader.take)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # RecursionError is one
        raise ValueError(f"what was sent is no plain data ({type(error).__name__})") from None


def gather(value: Any, gather_tensors: Callable[[Tensor], list[Tensor]]) -> list[Any]:
    """A small value of every worker, in rank order.

    Args:
        value: of this worker; as of :func:`pack`.
        gather_tensors: gives a tensor of every worker, given that of this one, of equal size.

    Raises:
        ExchangeError: on all workers, if one sends too much, or no plain data.
    """
    mine = pack(value)
    sizes = [int(size) for size in gather_tensors(torch.tensor([mine.numel()], device="cpu"))]
    for rank, size in enumerate(sizes):
        require_size(size, MOST_BYTES, f"Worker {rank}")
    padded = mine.new_zeros(max(sizes))
    padded[: mine.numel()] = mine
    everybody = gather_tensors(padded)
    return [
        read(data[:size], f"Worker {rank}")
        for rank, (data, size) in enumerate(zip(everybody, sizes, strict=True))
    ]


def read(data: Tensor, who: str) -> Any:
    """What ``who`` has sent, by :func:`pack`.

    Raises:
        ExchangeError: it is no plain data.
    """
    try:
        return unpack(data)
    except ValueError as error:
        raise ExchangeError(
            f"{who} did not send what workers send: {error}. Nothing of it was run. Give all"
            " workers the same version of lightning-easgd, and let nobody else reach MASTER_PORT."
        ) from None


def require_size(size: int, most: int, who: str) -> None:
    """Check how much another worker is about to send, before memory is taken for it.

    Raises:
        ExchangeError: it is more than allowed.
    """
    if not 0 <= size <= most:
        raise ExchangeError(
            f"{who} wants to send {size} bytes where at most {most} are allowed. Give all workers"
            " the same version of lightning-easgd, and let nobody else reach MASTER_PORT."
        )


def most_bytes_of_state(elements: int) -> int:
    """Of weights and the states of optimizers for so many elements of parameters."""
    return MOST_BYTES + _STATE_COPIES * torch.float64.itemsize * elements


def _written(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON has it; tensors are put into a list of their own."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or name not in _DTYPES:
            raise TypeError(f"A tensor with {value.layout} and {value.dtype} cannot be sent.")
        tensors.append(value)
        return {"tensor": [name, list(value.shape)]}
    if isinstance(value, list):
        return [_written(each, tensors) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_written(each, tensors) for each in value]}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {
            kind: [[_written(key, tensors), _written(each, tensors)] for key, each in value.items()]
        }
    return _plain(value)


def _plain(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):  # numpy's, too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(
        f"{type(value).__name__} {value!r:.200} cannot be sent to other workers. Allowed: None,"
        " bool, int, float, str, dense tensors, and lists, tuples and dictionaries of them."
    )


def _read(node: Any, take: Callable[[str, list[int]], Tensor]) -> Any:
    if isinstance(node, list):
        return [_read(each, take) for each in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        name, shape = content
        return take(name, shape)
    if kind == "tuple":
        return tuple(_read(each, take) for each in content)
    pairs = {_read(key, take): _read(each, take) for key, each in content}
    return {"dict": dict, "counter": Counter}[kind](pairs)


class _Tensors:
    """Takes tensors out of the bytes behind the text, one after the other."""

    def __init__(self, data: Tensor) -> None:
        self._data = data

    def take(self, name: str, shape: list[int]) -> Tensor:
        dtype = _DTYPES[name]
        if not all(type(extent) is int and 0 <= extent <= 2**40 for extent in shape):
            raise ValueError("a shape is none")
        size = dtype.itemsize * math.prod(shape)
        if size > self._data.numel():
            raise ValueError("a tensor is cut short")
        taken, self._data = self._data[:size], self._data[size + -size % _ALIGNMENT :]
        # Copied: torch cannot save tensors of several precisions that share one memory.
        return taken.view(dtype).view(shape).clone()
