"""The Lightning adapter: EASGDStrategy, and nothing but.

Each of its methods that Lightning calls is passed on: to the fit that is under way, to the
collectives that take the place of Lightning's, or to what saves and restores.
"""

from __future__ import annotations

import atexit
import os
import signal
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device, rank_zero_info
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_easgd.algorithms import AVERAGED, RULES, CenterAverage, Rule
from lightning_easgd.center.policies import Buffers
from lightning_easgd.communication import (
    Codec,
    Phase,
    Stop,
    WorkerGroup,
    gather,
    leave_all_groups,
    monitored,
    start_equal_,
)
from lightning_easgd.exchange.policy import ElasticPoint
from lightning_easgd.groups import Groups, Members, arrange_levels
from lightning_easgd.schedules import ScalarOrSchedule, Tau
from lightning_easgd.schedules.checks import (
    require_bools,
    require_choice,
    require_duration,
    require_timedelta,
)
from lightning_easgd.strategy.build import make_center
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO
from lightning_easgd.strategy.collectives import Collectives, SettingUp
from lightning_easgd.strategy.fit import EqualWorkers, Fit
from lightning_easgd.strategy.lightning_internals import (
    ForkingLauncher,
    LoopHooks,
    StrategyRegistry,
    WrappingCheckpointIO,
    without_processes,
)
from lightning_easgd.strategy.options import Options
from lightning_easgd.strategy.other_package import explain_import
from lightning_easgd.strategy.persistence import Persistence
from lightning_easgd.strategy.signals import SignalRelay
from lightning_easgd.strategy.unsupported import (
    refuse_devices,
    refuse_features,
    refuse_in_notebooks,
)
from lightning_easgd.strategy.validation import refuse
from lightning_easgd.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import lightning.pytorch as pl
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

EvaluateOn = Literal["center", "worker"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class EASGDStrategy(DDPStrategy):
    """Elastic Averaging SGD: every worker trains on its own and is tied to a shared center.

    Every ``tau`` optimizer steps a worker x and the center c pull at each other with the moving
    rate α: x loses α (x - c), c gains the sum of it over all workers (Zhang, Choromanska, LeCun
    2015, arXiv:1412.6651, eq. 2-6). With a Nesterov optimizer in the module this is EAMSGD (Alg.
    2). The sum travels while training goes on; the result is that of a blocking exchange, bit for
    bit. Evaluation, checkpoints and the module after ``fit`` are the center.

    Other rules of the family (``algorithm``) share all of this but the pull: under them, workers
    wait for the sum and go on from the new center.

    Args:
        algorithm: what an exchange does: the name of a rule ("easgd", "local_sgd", "downpour",
            "post_local_sgd", "mdownpour", "slowmo", "bmuf", "diloco", "sma", "leader_sgd") or a
            Rule with options of its own.
        tau: communication period τ, in optimizer steps: a whole number, a callable of the
            optimizer step, a Schedule (see schedules/), or "auto": the smallest from 1 to 64 at
            which exchanges hide behind training, found by measuring (see automatic.py). Other
            bounds are said by Auto(min=, max=). None: 10, or what the rule is limited to.
        beta: β = pα, how far the center moves towards the mean of the p workers, in (0, 2).
        alpha: α, how far a worker moves towards the center, in [0, 2/(p+1)).
        rho: elastic strength ρ; α = ηρ with the current learning rate η of each parameter group. At
            most one of beta, alpha and rho is given, as a number, a callable of the optimizer step
            or a Schedule; none: β = 0.9. For rules that pull.
        overlap: let the all-reduce travel behind the following steps. The same bits either way.
            None: if the rule can, which those that pull can.
        evaluate_on: what validation during ``fit`` sees: the center, or each worker's own weights.
        buffers: what becomes of float buffers in the center: the average over the workers, worker
            0's ("broadcast"), or each worker's own ("local"); or policies by name or pattern, as in
            {"queue": "local", "teacher.*": "average"}, of which the first that matches counts, for
            frozen parameters too. Spectral norm's vectors are computed anew from the center's
            weight ("recompute"). Integers, what quantisation observes and what the state dict
            leaves out are local unless a pattern says otherwise.
        elastic_point: from where a worker is pulled under ``torch.optim.SGD(nesterov=True)``: the
            paper's iterate x, or the stored look-ahead parameter y = x + δv. None: the iterate;
            rules that do not pull take the parameter.
        final_exchange: one last exchange at the end of ``fit``.
        strict_resume: whether it is an error if the own state of a worker is missing or damaged in
            the checkpoint that training resumes from; else that worker starts at the center.
        exchange_timeout: how long a worker waits for others that do not come, in exchanges and in
            other collectives of ``fit``, in seconds or as a timedelta, before an error names them.
        compression: how differences travel: None for full precision, "bf16", "fp16", "int8" (a
            quarter of the bytes), "topk" (the largest hundredth), or a Codec. What is lost on the
            way goes with the next exchange; strengths that are not stable with it are refused.
        fragments: into how many parts the model is cut, one of which is exchanged every
            tau / fragments steps; every parameter still every ``tau`` steps.
        groups: workers that a fast network joins: a number of workers, "node" for those of each
            machine, or lists of ranks. Their gradients are averaged at every step, and each group
            takes part in exchanges as one worker, p being the number of groups. With Groups(...)
            the workers of a group are tied to a center of its own instead, which takes part in
            exchanges as one worker: Tree EASGD, of more levels with groups inside.
            None: every worker trains on its own.
        center_device: "cpu" keeps the center in pinned host memory, and exchanges from there over
            gloo; None: where the parameters are.
        center_average: a running average of the center takes its place in evaluation, checkpoints
            and the module after ``fit``: "polyak" (of all its moves), "ema" (of some 1000 latest)
            or CenterAverage("ema", rate=...). None: the center itself.
        bucket_bytes: the most that one all-reduce carries, in bytes.
        accelerator: as for DDPStrategy, like all that follow.
        parallel_devices: the devices of this node.
        cluster_environment: where ranks and addresses come from.
        checkpoint_io: how checkpoints are written.
        precision_plugin: the precision plugin.
        process_group_backend: "nccl", "gloo", ...; None chooses by device.
        timeout: how long a collective of Lightning's may take before it fails, where training is
            not set up.
        start_method: how the workers of this node are started.
        **unsupported: refused, with the reason.

    Raises:
        ValueError: an argument is out of range; later, at set-up, α is unstable for the number of
            workers, the module has nothing to train, or the workers' modules differ.
        TypeError: an argument is unknown, or configures DDP's gradient reduction, which does not
            happen here.
    """

    strategy_name = "easgd"

    def __init__(
        self,
        *,
        algorithm: str | Rule = "easgd",
        tau: Tau | None = None,
        beta: ScalarOrSchedule | None = None,
        alpha: ScalarOrSchedule | None = None,
        rho: ScalarOrSchedule | None = None,
        overlap: bool | None = None,
        evaluate_on: EvaluateOn = "center",
        buffers: Buffers = "average",
        elastic_point: ElasticPoint | None = None,
        final_exchange: bool = True,
        strict_resume: bool = False,
        exchange_timeout: float | timedelta = timedelta(minutes=5),
        compression: str | Codec | None = None,
        fragments: int = 1,
        groups: Members | Groups | None = None,
        center_device: Literal["cpu"] | None = None,
        center_average: Literal["polyak", "ema"] | CenterAverage | None = None,
        bucket_bytes: int = 25 * 2**20,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
        **unsupported: Any,
    ) -> None:
        refuse(unsupported, of=type(self))
        require_choice("evaluate_on", evaluate_on, get_args(EvaluateOn))
        require_bools(strict_resume=strict_resume)
        options = Options.check(
            algorithm=algorithm,
            tau=tau,
            beta=beta,
            alpha=alpha,
            rho=rho,
            overlap=overlap,
            buffers=buffers,
            elastic_point=elastic_point,
            final_exchange=final_exchange,
            compression=compression,
            fragments=fragments,
            groups=groups,
            center_device=center_device,
            center_average=center_average,
            bucket_bytes=bucket_bytes,
            log=rank_zero_info,
        )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=require_timedelta("timeout", timeout),
            start_method=start_method,
        )
        self.options = options
        """Of the exchanges."""
        self.telemetry = Telemetry()
        self._evaluate_on = evaluate_on
        self._collective_timeout = timeout
        self._exchange_timeout = require_duration("exchange_timeout", exchange_timeout)
        self._persistence = Persistence(
            owner=self,
            collect=self._collect,
            arrange=self._arranged_groups,
            strict_resume=strict_resume,
            timeout=self._exchange_timeout,
        )
        self._last_center: dict[str, Any] | None = None
        self._failed = False
        # Of the run, of what it has set up, and of the fit; None outside of them.
        self._signals: SignalRelay | None = None
        self._workers: EqualWorkers | None = None
        self._collectives: Collectives | None = None
        self._fit: Fit | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        names: dict[str, dict[str, Any]] = {name: {"algorithm": name} for name in RULES}
        names |= AVERAGED
        explain_import((name + suffix for name in names for suffix in methods), cls)
        for name, options in names.items():
            for suffix, start_method in methods.items():
                strategy_registry.register(
                    name + suffix,
                    cls,
                    description=f"EASGDStrategy with {options} and `start_method` '{start_method}'",
                    start_method=start_method,
                    **options,
                )

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy of a trainer begins anew, as one of DDP's does: what binds this process stays here.
        bound = dict.fromkeys(("_signals", "_workers", "_collectives", "_fit"))
        return {**super().__getstate__(), **bound, "_launcher": without_processes(self._launcher)}

    def center_state_dict(self) -> dict[str, Any]:
        """The module's state dict with the center's weights, at any time from ``fit`` on.

        Waits for the exchange in flight. After ``fit`` it is the module itself; with
        ``center_average``, whose average the module then is, the center that was averaged.

        Raises:
            RuntimeError: the strategy has no module yet, or the center stayed in another process.
        """
        if self.lightning_module is None:
            raise RuntimeError(
                "center_state_dict() has no module to read before Trainer.fit(module) was called."
                " Call it while or after the trainer runs, or use module.state_dict()."
            )
        if self._fit is not None:
            return self._fit.center_state_dict()
        if self.options.averaging is not None and self._last_center is None:
            raise RuntimeError(
                "center_state_dict() has no center to read: with center_average the module holds"
                " its running average, and the center is known only where it was trained, from the"
                " start of training on. Call it there, or use module.state_dict()."
            )
        return self._last_center or self.lightning_module_state_dict()

    @override
    def _configure_launcher(self) -> None:
        refuse_devices(self.parallel_devices or [])
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = ForkingLauncher(self, start_method=self._start_method)
        assert self._launcher is not None
        if not self._launcher.is_interactive_compatible:
            refuse_in_notebooks(self.options.name)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        atexit.unregister(leave_all_groups)  # of an earlier trainer in this process
        atexit.register(leave_all_groups)
        assert self.lightning_module is not None
        self._persistence.await_restoring(self.lightning_module.trainer)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._signals = SignalRelay(trainer, LoopHooks(trainer), self._request_stop)
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_features(trainer, sync_batchnorm=self._layer_sync is not None)
            self._last_center = None
        self._workers = self._fit = None
        self._failed = False
        super().setup(trainer)
        if self._workers is None:  # this is no fit
            return
        self.telemetry = Telemetry()
        self._fit = Fit(
            trainer,
            self._workers,
            signals=self._signals,
            options=self.options,
            groups=self._arranged_groups(),
            telemetry=self.telemetry,
            validates_center=self._evaluate_on == "center",
        )
        self._collectives = Collectives(self._workers.group, self._fit)

    @override
    def configure_ddp(self) -> None:
        """Make the workers equal instead of wrapping the module."""
        module = self.lightning_module
        assert module is not None
        group = WorkerGroup(
            self._exchange_timeout,
            self._collective_timeout,
            from_host=self.options.offload or self.root_device.type == "cpu",
        )
        self._collectives = Collectives(group, SettingUp())
        start_equal_(group, module, self.options.lines())
        self._workers = EqualWorkers(group, make_center(module, self.options, group.rank))

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
        return self._under_way.training_step(partial(super().training_step, *args, **kwargs))

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
        if self._fit is not None and not self._failed:
            self._fit.finish_exchanging()
            if self.options.averaging is not None:
                exchange, module = self._fit.exchange, self._fit.module
                center = exchange.center_state_dict(module, latest=False)
                self._last_center = move_data_to_device(center, "cpu")
            self._fit = None
        collectives = self._collectives
        try:
            if collectives is not None and not self._failed:
                self._persistence.finish_writing(collectives.group)
        finally:
            if collectives is not None:
                collectives.group.close()
            self._signals = self._workers = self._collectives = None
            self._persistence.end()
            super().teardown()

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """What writes files; ours, also within plugins that wrap one, unless it was chosen."""
        # Not sooner: what is there is taken for the user's choice, and a plugin refused beside it.
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # where it has none
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that checkpoints hold: the center, or its running average.

        The single place that names them.
        """
        if self._fit is None or self.lightning_module is None:
            return super().lightning_module_state_dict()
        return self._fit.center_state_dict(delivered=True)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write the center, and beside it every worker's own state."""
        self._persistence.save(checkpoint, os.fspath(filepath), self._fit, storage_options)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._persistence.files().remove(os.fspath(filepath))

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
        if self._collectives is not None:
            return self._collectives.group.gather(value)
        return gather(value, self._collective_timeout)

    def _arranged_groups(self) -> list[list[list[int]]]:
        """The ranks of every group, level by level from the outermost inward.

        Empty if there are no groups. All workers must call it.
        """
        groups = self.options.groups
        return arrange_levels(groups, self._collect(self.node_rank) if groups else [])
