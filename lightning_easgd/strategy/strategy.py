"""The Lightning adapter: EASGDStrategy, and nothing but.

It tells the exchange when a step begins and ends, swaps the center in where Lightning evaluates or
saves the module, and keeps Lightning from coupling the workers between exchanges.
"""

from __future__ import annotations

import atexit
import signal
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device, rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_easgd.algorithms import AVERAGED, RULES, CenterAverage, Rule
from lightning_easgd.center.center import Center
from lightning_easgd.center.policies import Buffers
from lightning_easgd.center.swap import leaving_eval
from lightning_easgd.communication import (
    Codec,
    Phase,
    Stop,
    WorkerGroup,
    leave_all_groups,
    make_equal_,
    require_equal,
    start_equal_,
)
from lightning_easgd.exchange.policy import ElasticPoint
from lightning_easgd.groups import Groups, Members
from lightning_easgd.schedules import ScalarOrSchedule, Tau, TrainingLength
from lightning_easgd.schedules.checks import (
    require_bools,
    require_choice,
    require_duration,
    require_timedelta,
)
from lightning_easgd.strategy.build import make_center, make_exchange
from lightning_easgd.strategy.lightning_internals import (
    ForkingLauncher,
    LoopHooks,
    StrategyRegistry,
    stops_early,
    without_processes,
)
from lightning_easgd.strategy.options import Options
from lightning_easgd.strategy.other_package import explain_names, hint
from lightning_easgd.strategy.persistence import PersistentStrategy
from lightning_easgd.strategy.resume_epoch import begin_epoch_as_usual
from lightning_easgd.strategy.signals import SignalRelay
from lightning_easgd.strategy.unsupported import (
    batches_per_epoch,
    expected_training,
    may_skip_batches,
    may_skip_steps,
    refuse_devices,
    refuse_features,
    refuse_in_notebooks,
)
from lightning_easgd.strategy.validation import refuse
from lightning_easgd.telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

EvaluateOn = Literal["center", "worker"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

_BETWEEN_BATCHES = "between two batches: loader, hooks or callbacks"


class EASGDStrategy(PersistentStrategy):
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
            options=options,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            strict_resume=strict_resume,
            exchange_timeout=require_duration("exchange_timeout", exchange_timeout),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=require_timedelta("timeout", timeout),
            start_method=start_method,
        )
        self._evaluate_on = evaluate_on
        self.telemetry = Telemetry()
        self._center: Center | None = None
        self._last_center: dict[str, Any] | None = None
        self._failed = False
        self._uneven = self._uneven_steps = False
        self._hooks: LoopHooks | None = None
        self._signals: SignalRelay | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        names: dict[str, dict[str, Any]] = {name: {"algorithm": name} for name in RULES}
        names |= AVERAGED
        explain_names(name + suffix for name in names for suffix in methods)
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
    def __repr__(self) -> str:
        # pytorch_lightning's Trainer, which takes it for no strategy, puts it into its message.
        return f"<lightning_easgd.EASGDStrategy for lightning.pytorch.Trainer{hint()}>"

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy of a trainer begins anew, as one of DDP's does: what binds this process stays here.
        bound = (
            *("_group", "_exchange", "_center", "_hooks", "_signals"),
            *("_resumed", "_own", "_saved", "_stop_restoring"),
        )
        launcher = without_processes(self._launcher)
        return {**super().__getstate__(), **dict.fromkeys(bound), "_launcher": launcher}

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
        if self._exchange is not None:
            latest = not self._alone
            return self._exchange.center_state_dict(self.lightning_module, latest=latest)
        if self.options.averaging is not None and self._last_center is None:
            raise RuntimeError(
                "center_state_dict() has no center to read: with center_average the module holds"
                " its running average, and the center is known only where it was trained, from the"
                " start of training on. Call it there, or use module.state_dict()."
            )
        return self._last_center or self.lightning_module_state_dict()

    def _center_on_host(self) -> dict[str, Any]:
        assert self._exchange is not None
        assert self.lightning_module is not None
        state = self._exchange.center_state_dict(self.lightning_module, latest=False)
        return move_data_to_device(state, "cpu")  # type: ignore[no-any-return]

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

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._hooks = LoopHooks(trainer)
        self._hooks.before_batch(self._before_batch)
        self._signals = SignalRelay(trainer, self._hooks, self._request_stop)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_features(trainer, sync_batchnorm=self._layer_sync is not None)
            self._last_center = None
        self._exchange, self._failed = None, False
        self._uneven = self._uneven_steps = False
        super().setup(trainer)
        if fitting:
            self._set_up_exchange(trainer)
            self._hooks.around_validation(self._validating)
            self._hooks.before_end(self._finish)
            assert self._exchange is not None
            self._hooks.around_dump(self._saving, self._exchange.after_dump)

    @override
    def configure_ddp(self) -> None:
        """Make the workers equal instead of wrapping the module."""
        module = self.lightning_module
        assert module is not None
        assert self._timeout is not None
        self._group = WorkerGroup(
            self._exchange_timeout,
            self._timeout,
            from_host=self.options.offload or self.root_device.type == "cpu",
        )
        start_equal_(self._group, module, self.options.lines())
        self._center = make_center(module, self.options, self._group.rank)

    def _set_up_exchange(self, trainer: pl.Trainer) -> None:
        assert self._group is not None
        assert self._center is not None
        self.telemetry = Telemetry()
        self._exchange = make_exchange(
            self._center,
            self._group,
            self.options,
            groups=self._arranged_groups(),
            trainer=trainer,
            telemetry=self.telemetry,
        )

    def _enter(self, place: str) -> None:
        """Let the others know where this worker is, should they come to wait for it."""
        if self._group is not None:
            self._group.progress.enter(place)

    def _request_stop(self, why: Stop) -> bool:
        if self._exchange is None or self._failed:
            return False
        return self._exchange.request_stop(why)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._exchange is not None
        assert self._group is not None
        assert self._hooks is not None
        assert self._signals is not None
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        data = batches_per_epoch(trainer), may_skip_batches(trainer), may_skip_steps(trainer)
        length, written = astuple(expected_training(trainer)), self._exchange.was_written()
        changed = self._resumed is None and self._exchange.module_changed()
        mine = trainer.global_step, data, length, written, changed
        steps, told, expected, wrote, replaced = zip(*self._group.gather(mine), strict=True)
        if any(replaced):
            require_equal(self._group, self.lightning_module, self.options.lines())
            self._exchange.follow_module()
        if any(wrote) or any(replaced):
            self._begin_equal()
        lengths = [TrainingLength(*each) for each in expected]
        self.options.rules.schedules.begin(TrainingLength.of_all(lengths))
        if self._resumed is None:
            self._exchange.start_clock(max(steps))
        else:
            self._exchange.resume(goes_on=self._resumed.own is not None)
            self._resumed.restore_random_state()
            begin_epoch_as_usual(trainer, self._hooks)
            self._resumed = None  # as large as the worker's state
        self._hooks.on_time_limit(self._signals.time_is_over)
        batches, skip_batches, skip_steps = zip(*told, strict=True)
        self._uneven_steps = self._group.size > 1 and any(skip_steps)
        differ = len(set(batches)) > 1 or None in batches or any(skip_batches)
        self._uneven = self._uneven_steps or (self._group.size > 1 and differ)
        self._hooks.after_batch(self._after_batch)
        self._hooks.before_epoch_end(self._before_epoch_end)

    def _begin_equal(self) -> None:
        """User code wrote to weights before training: those of worker 0 count where they differ."""
        assert self._group is not None
        assert self._center is not None
        if differing := make_equal_(self._group, self._center.named_tensors()):
            named = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
            warnings.warn(
                f"The workers do not begin with the same weights: {named} differed when training"
                " began, because hooks or the sanity check wrote to them. All workers go on from"
                " those of worker 0. Write the same on every worker: load the same file, or call"
                " seed_everything before random ones are drawn.",
                stacklevel=2,
            )

    def _before_batch(self) -> None:
        self._enter(_BETWEEN_BATCHES)
        # Between exchanges nobody waits for anybody, but whoever leaves, leaves with all others.
        if self._exchange is not None and self._exchange.stopping.by_exception:
            self._meet(Phase.STOP)

    def _after_batch(self) -> None:
        self._enter(_BETWEEN_BATCHES)
        assert self._exchange is not None
        assert self.lightning_module is not None
        if stops_early(self.lightning_module.trainer):
            # Perhaps on this worker alone: the others are told, and waited for, from now on.
            self._exchange.request_stop(Stop.ENOUGH)
            self._uneven = True

    def _before_epoch_end(self) -> None:
        assert self._exchange is not None
        self._meet_if_uneven(Phase.EPOCH_END)
        self._exchange.writes.end_epoch(self._exchange.clock)

    def _meet_if_uneven(self, phase: Phase) -> None:
        self._enter(f"at {phase.name.lower().replace('_', ' ')}")
        if self._uneven:
            self._meet(phase)

    def _meet(self, phase: Phase) -> None:
        """Wait for workers that have more batches than this one, answering their exchanges."""
        assert self._exchange is not None
        assert self._signals is not None
        self._exchange.meet(phase)
        self._stop()

    def _stop(self) -> None:
        assert self._exchange is not None
        assert self._signals is not None
        self._signals.stop(self._exchange.stopping, self._exchange.stop_askers)

    @override
    def _gathered(self, phase: Phase) -> bool:
        # Metrics may be reduced at every batch: there, batches that differ end in a late error.
        every_batch = phase in (Phase.REDUCTION, Phase.GATHERING)
        if self._uneven_steps or not every_batch:
            self._meet_if_training(phase)
        return super()._gathered(phase)

    def _meet_if_training(self, phase: Phase) -> None:
        trains = self._exchange is not None and self._exchange.trains
        if trains and not self._interrupted:  # who left together is together
            self._meet_if_uneven(phase)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of this worker, whose loss the rule may want to know."""
        self._enter("in a training step")
        assert self._exchange is not None
        assert self.lightning_module is not None
        self._exchange.before_batch()
        output = super().training_step(*args, **kwargs)
        known = self._exchange.after_training_step(output)
        if not known and not self.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"{self.options.rules.algorithm} compares the workers' training losses, and under"
                " manual optimization training_step returned none. Return the loss, or"
                " {'loss': loss}."
            )
        return output

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Under manual optimization gradients are averaged here: what follows may clip them."""
        assert self._exchange is not None
        assert self.lightning_module is not None
        loss = super().backward(*args, **kwargs)
        if not self.lightning_module.automatic_optimization:
            self._exchange.average_gradients(anew=True)
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
        assert self._exchange is not None
        assert self._signals is not None
        exchange = self._exchange

        def averaged() -> Any:
            exchange.writes.before_closure()
            loss = closure()
            exchange.writes.before_step()
            exchange.average_gradients()  # before they are unscaled and clipped
            return loss

        with exchange.step(optimizer):
            output = super().optimizer_step(optimizer, averaged, model, **kwargs)
        if self._exchange.stopping.in_time:
            self._stop()
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter("in validation")
        return super().validation_step(*args, **kwargs)

    @contextmanager
    def _validating(self) -> Iterator[None]:
        assert self._exchange is not None
        assert self.lightning_module is not None
        if self._exchange.begun:
            self._meet_if_uneven(Phase.VALIDATION)
        with ExitStack() as stack:
            if self._evaluate_on == "center":
                stack.enter_context(self._exchange.showing(during="validation"))
            if not is_overridden("on_validation_model_train", self.lightning_module):
                stack.enter_context(leaving_eval(self.lightning_module))
            yield

    @contextmanager
    def _saving(self) -> Iterator[None]:
        self._enter("saving a checkpoint")
        assert self._exchange is not None
        self._exchange.before_save()
        self._meet_if_training(Phase.SAVE)
        assert self._exchange is not None
        with self._exchange.showing(latest=not self._alone, during="a checkpoint"):
            yield

    def _finish(self) -> None:
        """What fit delivers is in the module before the first hook of the end."""
        self._enter("at the end of training")
        assert self._exchange is not None
        if not self._exchange.finish(exchange=self.options.final_exchange):
            self._stop()

    @override
    def on_train_end(self) -> None:
        assert self._exchange is not None
        if self._exchange.stopping is not Stop.PREEMPTED:  # after which nothing is left to do
            self._stop()

    @override
    def on_exception(self, exception: BaseException) -> None:
        # Another worker may be gone: await nothing, leave no group; the center stays readable.
        self._failed = True
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM  # not 0: training did not end well
        atexit.unregister(leave_all_groups)
        if self._group is not None:
            self._group.explain(exception)
            together = self._exchange is not None and self._exchange.stopping.by_exception
            self._group.abandon(f"{type(exception).__name__}: {exception}", alone=not together)
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self._signals is not None and self._hooks is not None:
            self._signals.restore()
            self._hooks.restore()
            self._signals = self._hooks = None
        if not self._failed:
            if self._exchange is not None:
                # Resumed from the end of training: Lightning runs no loop, and ends none.
                self._exchange.finish(exchange=self.options.final_exchange)
                if self.options.averaging is not None:
                    self._last_center = self._center_on_host()
            self._exchange = self._center = None
        try:
            if not self._failed:
                self._finish_writing()
        finally:
            if self._group is not None:
                self._group.close()
                self._group = None
            super().teardown()
