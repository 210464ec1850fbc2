"""DDPStrategy for workers that may have no process group: then each is alone, for Lightning too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override


class Apart(DDPStrategy):
    """DDPStrategy, or where ``solo`` is set the same without anything that workers do together.

    Workers that were started together have different ranks and split the data, and that is all.
    """

    solo = False
    """Whether no worker waits for another."""
    _whole = False
    """Whether a loader is prepared of which this worker has all, as where it validates alone."""

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0} if self._whole else super().distributed_sampler_kwargs

    @contextmanager
    def preparing(self, trains: bool) -> Iterator[None]:
        """A loader gets its sampler: only for training do workers share the data out."""
        self._whole = self.solo and not trains
        try:
            yield
        finally:
            self._whole = False

    @override
    def setup_distributed(self) -> None:
        if not self.solo:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        if self.world_size > 1:  # worker 0 says here where the center is; SLURM sets no variables
            os.environ["MASTER_ADDR"] = environment.main_address
            os.environ["MASTER_PORT"] = str(environment.main_port)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if not self.solo or trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self.solo:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self.solo else super().broadcast(obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self.solo else super().reduce_boolean_decision(decision, all)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self.solo else super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor[None] if self.solo else super().all_gather(tensor, group, sync_grads)
