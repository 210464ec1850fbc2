"""Spectral norm's vectors u and v, which belong to a weight: computed anew for the center's.

[Note: recompute] While a worker trains, its vectors follow its own weight by a power iteration at
each forward pass. Their mean over the workers belongs to no weight. So they do not travel. Where
the module is given the center, they are computed from the center's weight alone, and so are the
same on all workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_easgd.center.names import dotted

_COLUMNS = 8
_MOST_ITERATIONS = 300
_CHECK_EVERY = 5
_PRECISION = 1e-6


@dataclass(frozen=True)
class SpectralNormed:
    """One weight that is divided by its largest singular value."""

    prefix: str
    owner: nn.Module
    """Has the vectors."""
    keys: tuple[str, str]
    """Of u and v."""
    weights: ParametrizationList | None
    """Holds the weight; None: the owner does, and a hook divides it."""
    norm: _SpectralNorm | SpectralNorm

    @property
    def names(self) -> tuple[str, str]:
        """Of u and v in the module."""
        u, v = self.keys
        return dotted(self.prefix, u), dotted(self.prefix, v)

    @torch.no_grad()
    def recompute_(self) -> None:
        """Let u and v be the leading singular vectors of the weight, where it is finite."""
        weight = self._weight()
        u, v = (self.owner._buffers[key] for key in self.keys)
        matrix = weight.movedim(self.norm.dim, 0).flatten(1)
        if u is None or v is None or matrix.is_complex() or not bool(matrix.isfinite().all()):
            return
        left, right = leading_vectors(matrix)
        u.copy_(left)
        v.copy_(right)
        if isinstance(self.norm, SpectralNorm):  # what forward() would set
            scale = torch.dot(u, matrix.to(u.dtype) @ v)
            setattr(self.owner, self.norm.name, weight / scale)

    def _weight(self) -> Tensor:
        if self.weights is None:
            assert isinstance(self.norm, SpectralNorm)
            return getattr(self.owner, f"{self.norm.name}_orig").detach()  # type: ignore[no-any-return]
        many = range(0 if self.weights.is_tensor else self.weights.ntensors)
        keys = [f"original{i}" for i in many] or ["original"]
        values = [getattr(self.weights, key).detach() for key in keys]
        for step in self.weights:
            if step is self.norm:
                break
            values = [step(*values)]  # of one that was registered before
        weight: Tensor = values[0]
        return weight


def spectral_norms(module: nn.Module) -> Iterator[SpectralNormed]:
    """All weights in a module that torch's spectral_norm divides, in either of its two forms."""
    for prefix, owner in module.named_modules():
        if isinstance(owner, ParametrizationList):
            for key, step in owner.named_children():
                if isinstance(step, _SpectralNorm) and "_u" in step._buffers:
                    yield SpectralNormed(f"{prefix}.{key}", step, ("_u", "_v"), owner, step)
        for hook in owner._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                keys = f"{hook.name}_u", f"{hook.name}_v"
                yield SpectralNormed(prefix, owner, keys, None, hook)


def leading_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors of the largest singular value; equal for equal matrices.

    By block power iteration from a fixed start, until that value is known to a millionth.
    """
    matrix = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    largest = matrix.abs().max()
    matrix = matrix / largest if bool(largest > 0) else matrix
    rows, columns = matrix.shape
    shape = columns, min(_COLUMNS, rows, columns)
    # On the host, also where torch.set_default_device names another one.
    start = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    block, last = start.to(matrix), 0.0
    for iteration in range(_MOST_ITERATIONS):
        block = torch.linalg.qr(matrix.T @ (matrix @ block)).Q
        if iteration % _CHECK_EVERY == 0:
            value = float(torch.linalg.matrix_norm(matrix @ block, 2))
            if value - last <= _PRECISION * value:
                break
            last = value
    _, _, inside = torch.linalg.svd(matrix @ block, full_matrices=False)
    left = functional.normalize(matrix @ (block @ inside[0]), dim=0)
    return left, functional.normalize(matrix.T @ left, dim=0)
