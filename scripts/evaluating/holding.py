"""The models that a checkpoint holds: what each has in the place of the main file's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from typing_extensions import override

from lightning_easgd.checkpoint.own_values import write_values
from lightning_easgd.checkpoint.restoring import Restorer
from lightning_easgd.checkpoint.state import SharedState

_OF_TRAINING = ("callbacks", "loops", "optimizer_states", "lr_schedulers")


class Held(CheckpointIO):
    """What a checkpoint holds, read without unpickling anything but plain data.

    It stands for a storage from which Lightning loads the main file, as often as it is tested.

    Args:
        path: of the main file.

    Raises:
        CheckpointError: it cannot be read, is damaged or of another layout.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._storage = TorchCheckpointIO()
        read = partial(self._storage.load_checkpoint, path, weights_only=True)
        found = self._reader(0).read(path, read, weights_only=True, own=False)
        self.shared = found.entry
        """What the workers shared; None for a model alone."""
        self._main = {k: v for k, v in found.checkpoint.items() if k not in _OF_TRAINING}
        self.missing: dict[str, str] = {}
        """Models that are not there, and why."""

    @property
    def step(self) -> int | None:
        """Optimizer steps taken."""
        return self._main.get("global_step")

    def models(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The name of each model, and its own values; those of a worker are read when it is due."""
        if self.shared is None:
            yield "model", {}
            self.missing["workers"] = (
                "the checkpoint is another strategy's, or holds weights alone, as final.ckpt does"
            )
        elif self.shared.averaged is None:
            yield "center", {}
        else:
            yield "center", _values(self.shared.averaged["center"])
            yield "running average", {}
        if self.shared is not None:
            yield from self._workers(self.shared)

    def _workers(self, shared: SharedState) -> Iterator[tuple[str, Mapping[str, Any]]]:
        total, count = dict[str, Tensor](), shared.workers
        for rank in range(count):
            own, problem = self._reader(rank).load_own(shared, self.path, weights_only=True)
            if own is None:
                self.missing[f"worker {rank}"] = problem or "it has no file"
                continue
            yield f"worker {rank}", own.weights
            total = _sum(total, own.weights["tensors"], first=rank == 0)
        if self.missing:
            self.missing["mean of the workers"] = f"{len(self.missing)} of {count} are missing"
        else:
            yield "mean of the workers", _values({n: s / count for n, s in total.items()})

    def put(self, values: Mapping[str, Any], module: nn.Module) -> None:
        """Put own values of a model into a module that holds the main file's."""
        elastic = {name for cohort in self.shared.cohorts for name in cohort} if self.shared else ()
        if values:
            write_values(module, values, last=elastic)

    def _reader(self, rank: int) -> Restorer:
        return Restorer(self._storage, rank=rank, gather=lambda value: [value])

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return dict(self._main)

    @override
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        raise NotImplementedError

    @override
    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"tensors": tensors, "added": {}}


def _sum(
    total: Mapping[str, Tensor], more: Mapping[str, Tensor], *, first: bool
) -> dict[str, Tensor]:
    """Of what can be averaged and all workers have; numbers of steps, masks and the like cannot."""
    wide = {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in more.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    if first:
        return wide
    return {n: s + wide[n] for n, s in total.items() if n in wide and s.shape == wide[n].shape}
