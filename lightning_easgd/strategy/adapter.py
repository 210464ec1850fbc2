"""What Lightning calls of a strategy, each method passed on to what does the work.

That is the fit under way, Collectives in the place of Lightning's, or Persistence.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.algorithms.groups import arrange_levels
from lightning_easgd.communication import (
    Phase,
    Stop,
    WorkerGroup,
    gather,
    leave_all_groups,
    monitored,
    start_equal_,
)
from lightning_easgd.strategy.apart import Apart
from lightning_easgd.strategy.build import make_center
from lightning_easgd.strategy.collectives import Collectives, SettingUp
from lightning_easgd.strategy.equal_workers import EqualWorkers
from lightning_easgd.strategy.fit import Fit
from lightning_easgd.strategy.launchers import without_processes
from lightning_easgd.strategy.lightning_internals import LoopHooks
from lightning_easgd.strategy.options import Options
from lightning_easgd.strategy.persistence import Persistence
from lightning_easgd.strategy.signals import SignalRelay
from lightning_easgd.strategy.unsupported import refuse_features
from lightning_easgd.telemetry import Telemetry


class Adapter(Apart):
    """DDPStrategy without DDP: workers train on their own, and exchange as the options have it.

    Args:
        options: of the exchanges.
        validates_center: whether validation sees the center, not each worker's own weights.
        strict_resume: as of Persistence.
        exchange_timeout: how long a worker waits for others.
        timeout: how long a collective of Lightning's may take where training is not set up.
        **lightnings: all else that DDPStrategy takes.
    """

    def __init__(
        self,
        options: Options,
        *,
        validates_center: bool,
        strict_resume: bool,
        exchange_timeout: timedelta,
        timeout: timedelta,
        **lightnings: Any,
    ) -> None:
        super().__init__(timeout=timeout, **lightnings)
        self.options, self._given, self.solo = options, options, options.center is not None
        self.telemetry = Telemetry()
        self._validates_center = validates_center
        self._exchange_timeout, self._collective_timeout = exchange_timeout, timeout
        self._persistence = Persistence(
            owner=self,
            collect=self._collect,
            arrange=self._arranged_groups,
            strict_resume=strict_resume,
            timeout=exchange_timeout,
        )
        self._last_center: dict[str, Any] | None = None
        self._failed = False
        # Of the run, of what it has set up, and of the fit; None outside of them.
        self._signals: SignalRelay | None = None
        self._workers: EqualWorkers | None = None
        self._collectives: Collectives | None = None
        self._fit: Fit | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy of a trainer begins anew, as one of DDP's does: what binds this process stays here.
        bound = dict.fromkeys(("_signals", "_workers", "_collectives", "_fit"))
        return {**super().__getstate__(), **bound, "_launcher": without_processes(self._launcher)}

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        atexit.unregister(leave_all_groups)  # of an earlier trainer in this process
        atexit.register(leave_all_groups)
        assert self.lightning_module is not None
        self._persistence.await_restoring(self.lightning_module.trainer)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        hooks = LoopHooks(trainer)
        if self.solo:
            hooks.around_preparing(self.preparing)
        self._signals = SignalRelay(trainer, hooks, self._request_stop)
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_features(trainer, sync_batchnorm=self._layer_sync is not None)
            self._last_center = None
        self._workers = self._fit = None
        self._failed = False
        super().setup(trainer)
        if self._workers is None:  # this is no fit
            return
        self.telemetry, self.options = Telemetry(), self._workers.options
        self._fit = Fit(
            trainer,
            self._workers,
            signals=self._signals,
            groups=self._arranged_groups(),
            telemetry=self.telemetry,
            validates_center=self._validates_center,
        )
        self._collectives = Collectives(self._workers.group, self._fit)

    @override
    def configure_ddp(self) -> None:
        """Make the workers equal, or ask the server, instead of wrapping the module."""
        module, options, rank = self.lightning_module, self._given, self.global_rank
        assert module is not None
        if self.solo:
            self._workers = EqualWorkers.at_server(
                *(module, options, self._exchange_timeout),
                rank=rank,
                workers=self.world_size,
                goes_on_from=self._persistence.goes_on_from,
            )
            self._collectives = Collectives(self._workers.group, SettingUp())
            return
        group = WorkerGroup(
            self._exchange_timeout,
            self._collective_timeout,
            from_host=options.offload or self.root_device.type == "cpu",
        )
        self._collectives = Collectives(group, SettingUp())
        start_equal_(group, module, options.lines())
        self._workers = EqualWorkers(group, make_center(module, options, group.rank), options)

    @property
    def _under_way(self) -> Fit:
        """The fit; Lightning asks for what follows only while there is one."""
        if self._fit is None:
            raise RuntimeError(
                "EASGDStrategy trains in Trainer.fit only, which is not under way. Call it, or let"
                " another strategy train by hand."
            )
        return self._fit

    def _request_stop(self, why: Stop) -> bool:
        fit = self._fit
        return fit is not None and not self._failed and fit.exchange.request_stop(why)

    @override
    def on_train_start(self) -> None:
        _ = self._under_way.own  # from here on it counts what moves
        super().on_train_start()
        self._under_way.begin(self._persistence.take_resumed())

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of this worker."""
        return self._under_way.training_step(partial(super().training_step, *args, **kwargs), args)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The gradients of this worker."""
        loss = super().backward(*args, **kwargs)
        self._under_way.after_backward()
        return loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """One step of one optimizer of this worker, with the exchange that is due at it.

        The clock counts these calls, whatever makes them: automatic or manual optimization, after
        gradient accumulation, for any of several optimizers.
        """
        step = super().optimizer_step
        return self._under_way.optimizer_step(
            optimizer, closure, lambda closure: step(optimizer, closure, model, **kwargs)
        )

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._fit is not None:
            self._fit.enter("in validation")
        return super().validation_step(*args, **kwargs)

    @override
    def on_train_end(self) -> None:
        self._under_way.end()

    @override
    def on_exception(self, exception: BaseException) -> None:
        # Another worker may be gone: await nothing, leave no group; the center stays readable.
        self._failed = True
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM  # not 0: training did not end well
        atexit.unregister(leave_all_groups)
        if self._collectives is not None:
            group = self._collectives.group
            group.explain(exception)
            together = self._fit is not None and self._fit.exchange.stopping.by_exception
            group.abandon(f"{type(exception).__name__}: {exception}", alone=not together)
        if self._alone:
            self._persistence.give_up()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        fit = None if self._failed else self._fit
        if fit is not None and self._persistence.resumed is not None:
            # From the end of training: Lightning runs no loop, which would begin and end it.
            fit.begin(self._persistence.take_resumed())
        if self._signals is not None:
            self._signals.restore()
        if fit is not None:
            fit.finish_exchanging()
            if fit.delivers_average:
                center = fit.exchange.center_state_dict(fit.module, latest=False)
                self._last_center = move_data_to_device(center, "cpu")
            self._fit = None
        collectives = self._collectives
        try:
            if collectives is not None and not self._failed:
                self._persistence.finish_writing(collectives.group)
        finally:
            if self._workers is not None and self._workers.server is not None:
                self._workers.server.leave()
            if collectives is not None:
                collectives.group.close()
            self._signals = self._workers = self._collectives = None
            self._persistence.end()
            super().teardown()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the center, and beside it every worker's own state."""
        self._persistence.save(checkpoint, os.fspath(filepath), self._fit, storage_options)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._persistence.remove(os.fspath(filepath))

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; where Lightning restores one, all workers do, each its own state."""
        read = partial(super().load_checkpoint, checkpoint_path)
        trainer = None if self.lightning_module is None else self.lightning_module.trainer
        return self._persistence.load(os.fspath(checkpoint_path), read, trainer, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        # While training is set up already, as the learning-rate finder does when it is done.
        if self._fit is not None:
            self._fit.exchange.read_module()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        load = partial(super().load_optimizer_state_dict, checkpoint)
        self._persistence.load_optimizers(load, self.optimizers)
        if self._fit is not None:
            load_module = partial(super().load_model_state_dict, checkpoint, strict=False)
            self._persistence.go_on(self._fit, load_module)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._collectives is not None:
            self._collectives.barrier(*args[:1])
        elif not self._alone:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._collectives is not None:
            return self._collectives.broadcast(obj, src)
        return obj if self._alone else super().broadcast(obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        together = self._collectives and self._collectives.together(Phase.COLLECTIVE)
        if together is False or self._alone:
            return decision
        return super().reduce_boolean_decision(decision, all)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._alone:
            return tensor
        if self._collectives is None or not monitored.is_default(group):
            return super().reduce(tensor, group, reduce_op)
        return self._collectives.reduce(tensor, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._alone:
            return tensor[None]
        if self._collectives is not None and monitored.is_default(group):
            self._collectives.before_gathering()
        return super().all_gather(tensor, group, sync_grads)

    @property
    def _alone(self) -> bool:
        """Whether this worker handles an exception that the others may know nothing of."""
        return self._fit is not None and self._fit.alone

    def _collect(self, value: Any) -> list[Any]:
        """A small value of every worker, in rank order; plain data, as of plain_data.pack."""
        if self.solo:
            return [value]
        if self._collectives is not None:
            return self._collectives.group.gather(value)
        return gather(value, self._collective_timeout)

    def _arranged_groups(self) -> list[list[list[int]]]:
        """The ranks of every group, level by level from the outermost inward.

        Empty if there are no groups. All workers must call it.
        """
        groups = self.options.groups
        return arrange_levels(groups, self._collect(self.node_rank) if groups else [])
