"""What users would take instead, driven as its makers say, under Lightning like all contenders."""

from __future__ import annotations

import itertools
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from typing_extensions import override

from comparing.counting import address_towards
from lightning_easgd.workloads.devices import single_device

_PATIENCE = timedelta(minutes=10)


def alone(accelerator: str) -> SingleDeviceStrategy:
    """A worker that knows of no other, or whose callbacks do."""
    device = single_device(accelerator)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return SingleDeviceStrategy(device)


class HookedDDP(DDPStrategy):
    """DDP with a communication hook on every device; Lightning registers it on GPUs only.

    Args:
        hook: a name in torch's ``ddp_comm_hooks.default_hooks``.
    """

    def __init__(self, hook: str, **options: Any) -> None:
        super().__init__(ddp_comm_hook=getattr(default_hooks, hook), **options)

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        assert self._ddp_comm_hook is not None
        self.model.register_comm_hook(None, self._ddp_comm_hook)


def post_local_sgd(period: int) -> DDPStrategy:
    """Lightning's post-local SGD, averaging models from the first step on."""
    state = PostLocalSGDState(None, None, start_localSGD_iter=0)
    return DDPStrategy(
        ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=period
    )


class Peer(pl.Callback):
    """Exchanges by something other than a Lightning strategy."""

    def __init__(self) -> None:
        self.wait_seconds = 0.0
        """Seconds spent in exchanges so far."""

    @contextmanager
    def waiting(self, *, due: bool) -> Iterator[None]:
        """Counts the time within, if an exchange is due."""
        began = time.perf_counter()
        yield
        if due:
            self.wait_seconds += time.perf_counter() - began


class PeriodicAveraging(Peer):
    """Blocking local SGD by torch's ``PeriodicModelAverager``.

    Args:
        period: steps between two averages.
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self._period = period
        self._averager: PeriodicModelAverager | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backend = "nccl" if pl_module.device.type == "cuda" else "gloo"
        dist.init_process_group(backend)
        self._averager = PeriodicModelAverager(self._period)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        assert self._averager is not None
        with self.waiting(due=self._averager.step % self._period == 0):
            self._averager.average_parameters(pl_module.parameters())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        average_parameters(pl_module.parameters(), dist.group.WORLD)


class Torchft(Peer):
    """A torchft algorithm with torchft's own manager: one replica group a worker.

    The lighthouse, which forms the quorum before every exchange, runs beside worker 0 and listens
    on MASTER_PORT.

    Args:
        period: steps between two exchanges.
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    @abstractmethod
    def algorithm(
        self, manager: Any, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[Any]:
        """What hooks into the optimizer's steps while it is entered."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_manager(pl_module, trainer.optimizers[0])
        self._entered = self.algorithm(self._manager, pl_module, trainer.optimizers[0])
        self._count_waits(self._entered)
        self._entered.__enter__()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._entered.__exit__(None, None, None)
        self._manager.shutdown(wait=False)

    def _start_manager(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL
        from torchft.coordination import LighthouseServer

        rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        lighthouse = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if rank == 0:
            port = os.environ["MASTER_PORT"]
            self._lighthouse = LighthouseServer(bind=f"0.0.0.0:{port}", min_replicas=workers)
        mine = address_towards(os.environ["MASTER_ADDR"])
        self._store = dist.TCPStore(mine, 0, is_master=True, wait_for_workers=False)
        kind = ProcessGroupNCCL if module.device.type == "cuda" else ProcessGroupGloo
        self._manager = Manager(
            pg=kind(timeout=_PATIENCE),
            load_state_dict=module.load_state_dict,
            state_dict=module.state_dict,
            min_replica_size=workers,
            use_async_quorum=False,
            init_sync=False,  # all begin with equal weights
            timeout=_PATIENCE,
            quorum_timeout=_PATIENCE,
            rank=0,
            world_size=1,
            store_addr=mine,
            store_port=self._store.port,
            lighthouse_addr=f"http://{lighthouse}",
            replica_id=f"worker{rank}",
            hostname=mine,
        )

    def _count_waits(self, algorithm: Any) -> None:
        after_step, steps = algorithm._step_post_hook, itertools.count(1)

        @wraps(after_step)
        def counted(*arguments: Any) -> None:
            with self.waiting(due=next(steps) % self.period == 0):
                after_step(*arguments)

        algorithm._step_post_hook = counted


class TorchftLocalSGD(Torchft):
    """torchft's LocalSGD."""

    @override
    def algorithm(
        self, manager: Any, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[Any]:
        from torchft.local_sgd import LocalSGD

        return LocalSGD(manager, module, optimizer, sync_every=self.period)


class TorchftDiLoCo(Torchft):
    """torchft's DiLoCo with Nesterov momentum outside (arXiv:2311.08105).

    Args:
        period: steps between two exchanges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
    """

    def __init__(self, period: int, outer_lr: float, outer_momentum: float) -> None:
        super().__init__(period)
        self._outer = partial(torch.optim.SGD, lr=outer_lr, momentum=outer_momentum, nesterov=True)

    @override
    def algorithm(
        self, manager: Any, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[Any]:
        from torchft.local_sgd import DiLoCo

        outer = self._outer(module.parameters())
        return DiLoCo(manager, [module], optimizer, outer, sync_every=self.period)
