"""Parameters <-> flat buffers: a layout computed once, every element covered exactly once.

A flat buffer is what crosses the network and what the update rules work on. Its precision is that
of the center: fp32 for fp16, bf16 and fp32 tensors, fp64 for fp64; a complex tensor counts as pairs
of reals.
"""

from __future__ import annotations

import gc
import hashlib
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LARGE_BYTES = 4 * 2**20

FLAT_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
"""The precision in which a tensor of each precision is averaged."""


def flat_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision in which a tensor of ``dtype`` is averaged.

    Raises:
        TypeError: the tensor ``name`` cannot be averaged.
    """
    if dtype not in FLAT_DTYPE:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLAT_DTYPE)
        raise TypeError(
            f"'{name}' has dtype {dtype}, which cannot be averaged. Allowed are {allowed}."
            " Freeze it (requires_grad=False) or store it in one of these."
        )
    return FLAT_DTYPE[dtype]


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself; a complex one as a view of reals with a trailing dimension of 2."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextmanager
def without_collection() -> Iterator[None]:
    """Let no garbage be searched for meanwhile.

    For a module of 20,000 parameters as many views are made for a moment. So many new objects make
    Python search all objects for garbage, which takes longer than the work on the views.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def as_reals(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As :func:`as_real`, of each; perhaps there are many, and few are complex."""
    if any(dtype.is_complex for dtype in {tensor.dtype for tensor in tensors}):
        return [as_real(tensor) for tensor in tensors]
    return tensors


@dataclass(frozen=True)
class Slot:
    """The place of one tensor: ``numel`` elements from ``offset`` of the buffer of ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int


class FlatLayout:
    """Where each of a list of named tensors lies in flat buffers, one buffer per precision.

    Args:
        tensors: names and tensors, in the order that every worker shares.

    Raises:
        TypeError: a tensor has a dtype that cannot be averaged.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.sizes: dict[torch.dtype, int] = {}
        slots = []
        for name, tensor in tensors:
            dtype = flat_dtype(name, tensor.dtype)
            shape = tuple(as_real(tensor.detach()).shape)
            offset, numel = self.sizes.get(dtype, 0), math.prod(shape)
            slots.append(Slot(name, shape, dtype, offset, numel))
            self.sizes[dtype] = offset + numel
        self.slots = tuple(slots)

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in order."""
        return [slot.name for slot in self.slots]

    @cached_property
    def fingerprint(self) -> int:
        """A hash of names, shapes and precisions, equal on every worker with the same layout."""
        text = ";".join(f"{slot.name}:{slot.shape}:{slot.dtype}" for slot in self.slots)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Memory:
    """Where flat buffers lie; ``pinned`` host memory is what a GPU copies from and to directly.

    Large buffers in other host memory have huge pages. In ordinary pages a copy of a model takes
    several times as long, because of page faults.
    """

    device: torch.device
    pinned: bool = False

    def allocate(self, sizes: Mapping[torch.dtype, int]) -> dict[torch.dtype, Tensor]:
        """Buffers by precision, whose values are arbitrary.

        Raises:
            RuntimeError: there is no such memory left.
        """
        try:
            return {dtype: self._empty(size, dtype) for dtype, size in sizes.items()}
        except RuntimeError as error:
            if not self.pinned:
                raise
            bytes_ = sum(dtype.itemsize * size for dtype, size in sizes.items())
            raise RuntimeError(
                f"center_device='cpu' needs {bytes_ / 2**20:.0f} MiB of page-locked host memory,"
                f" which this machine does not give ({error}). Raise its limit (ulimit -l, or the"
                " container's memlock), or leave center_device unset."
            ) from error

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        bytes_ = size * dtype.itemsize
        pageable = self.device.type == "cpu" and not self.pinned
        if not (pageable and bytes_ >= _LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")):
            return torch.empty(size, dtype=dtype, device=self.device, pin_memory=self.pinned)
        pages = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype)


class FlatVector:
    """One flat copy of a layout's tensors.

    Args:
        layout: of the tensors.
        buffers: where the values lie, by precision, each of shape (size,).

    Attributes:
        parts: the flat buffers.
    """

    def __init__(self, layout: FlatLayout, buffers: Mapping[torch.dtype, Tensor]) -> None:
        self.layout = layout
        self.parts = [buffers[dtype] for dtype in layout.sizes]

    @cached_property
    def views(self) -> list[Tensor]:
        """One view per slot, of the shape of the tensor that it holds; made when first needed."""
        slots = self.layout.slots
        views = {
            dtype: iter(torch.split(part, [s.numel for s in slots if s.dtype == dtype]))
            for dtype, part in zip(self.layout.sizes, self.parts, strict=True)
        }
        flat = (next(views[slot.dtype]) for slot in slots)
        return [
            v if len(s.shape) == 1 else v.view(s.shape) for v, s in zip(flat, slots, strict=True)
        ]

    def clone(self) -> FlatVector:
        """A copy with buffers of its own."""
        if not self.parts:
            return self
        twin = FlatVector(self.layout, Memory(self.parts[0].device).allocate(self.layout.sizes))
        torch._foreach_copy_(twin.parts, self.parts)
        return twin

    def read_(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors, in the order of the layout, into this vector."""
        with torch.no_grad():
            torch._foreach_copy_(self.views, list(as_reals(tensors)))

    @without_collection()
    def write_to(self, tensors: Sequence[Tensor]) -> None:
        """Copy this vector into tensors, in place and in their own precision.

        Autograd does not notice, as in :meth:`subtract_from`.
        """
        torch._foreach_copy_(_data(tensors), self.views)

    @without_collection()
    def subtract_from(self, tensors: Sequence[Tensor]) -> None:
        """Subtract this vector from tensors, in place; computed in this vector's precision.

        Autograd does not notice (hence ``.data``): a module with several optimizers may hold a
        graph over parameters that the step of one of them left alone, and go back through it after
        the pull.
        """
        targets = _data(tensors)
        torch._foreach_sub_(targets, self._views_on(targets))

    @without_collection()
    def mix_into(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Move tensors x by ``weight`` of the way to this vector, in place, in its precision.

        A tensor that equals this vector stays as it is. Autograd does not notice, as in
        :meth:`subtract_from`.
        """
        targets = _data(tensors)
        views = self._views_on(targets)
        if all(t.dtype == v.dtype for t, v in zip(targets, views, strict=True)):
            torch._foreach_lerp_(targets, views, weight)
            return
        for target, view in zip(targets, views, strict=True):
            target.copy_(torch.lerp(target.to(view.dtype), view, weight))

    def _views_on(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """The views, copied to the device of ``targets`` if this vector lies on another."""
        if not targets or targets[0].device == self.parts[0].device:
            return self.views
        there = {part.dtype: part.to(targets[0].device) for part in self.parts}
        return FlatVector(self.layout, there).views

    def zero_(self) -> None:
        """Set every element to zero."""
        for part in self.parts:
            part.zero_()

    def norm(self) -> float:
        """Euclidean norm over all elements; not finite if an element is not."""
        return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in self.parts))

    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return all(bool(torch.isfinite(part).all()) for part in self.parts)

    def checksum(self) -> int:
        """A wrapping sum over the bit patterns: equal bits give equal sums, on every device."""
        integers = {torch.float32: torch.int32, torch.float64: torch.int64}
        # Summed in their own width: a wider sum would first copy the whole buffer into it.
        return sum(int(p.view(i := integers[p.dtype]).sum(dtype=i)) for p in self.parts)


class Scratch(FlatVector):
    """A vector whose memory comes and goes while its views, which take long to make, stay.

    Args:
        like: a vector of the same layout, on the same device.
    """

    def __init__(self, like: FlatVector) -> None:
        super().__init__(like.layout, {part.dtype: torch.empty_like(part) for part in like.parts})

    def fill_(self, source: FlatVector) -> None:
        """Take memory, and copy ``source`` into it."""
        for part in self.parts:
            part.untyped_storage().resize_(part.nbytes)
        torch._foreach_copy_(self.parts, source.parts)

    def release(self) -> None:
        """Give the memory back."""
        for part in self.parts:
            part.untyped_storage().resize_(0)


def _data(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list(as_reals([tensor.data for tensor in tensors]))


def bucket_slices(numel: int, itemsize: int, bucket_bytes: int) -> list[slice]:
    """Cut ``numel`` elements of ``itemsize`` bytes into buckets of at most ``bucket_bytes`` bytes.

    Every element lies in exactly one bucket; a bucket holds at least one element.
    """
    step = max(1, bucket_bytes // itemsize)
    slices = [slice(at, min(at + step, numel)) for at in range(0, numel, step)]
    assert sum(s.stop - s.start for s in slices) == numel
    return slices
