"""EASGDStrategy as its users see it: options, names, launchers, files, what is delivered.

What Lightning calls while it runs is in the base class; see adapter.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from inspect import signature
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from typing_extensions import override

from lightning_easgd.algorithms import AVERAGED, RULES, CenterAverage, Rule
from lightning_easgd.algorithms.groups import Groups, Members
from lightning_easgd.center.policies import Buffers
from lightning_easgd.communication import Codec
from lightning_easgd.exchange.policy import ElasticPoint
from lightning_easgd.schedules import Often, ScalarOrSchedule, Tau
from lightning_easgd.schedules.checks import (
    require_bools,
    require_choice,
    require_duration,
    require_timedelta,
)
from lightning_easgd.strategy.adapter import Adapter
from lightning_easgd.strategy.arguments import refuse
from lightning_easgd.strategy.center_at import CenterAt
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO
from lightning_easgd.strategy.launchers import ForkingLauncher, SoloLauncher
from lightning_easgd.strategy.lightning_internals import (
    StrategyRegistry,
    WrappingCheckpointIO,
)
from lightning_easgd.strategy.options import Options
from lightning_easgd.strategy.other_package import explain_import
from lightning_easgd.strategy.unsupported import refuse_devices, refuse_in_notebooks

EvaluateOn = Literal["center", "worker"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class EASGDStrategy(Adapter):
    """Elastic Averaging SGD: every worker trains on its own and is tied to a shared center.

    Every ``tau`` optimizer steps a worker x and the center c pull at each other with the moving
    rate α: x loses α (x - c), c gains the sum of it over all workers (Zhang, Choromanska, LeCun
    2015, arXiv:1412.6651, eq. 2-6). With a Nesterov optimizer in the module this is EAMSGD (Alg.
    2). The sum travels while training goes on; the result is that of a blocking exchange, bit for
    bit. Evaluation, checkpoints and the module after ``fit`` are the center.

    Other rules of the family (``algorithm``) share all of this but the pull: under most of them
    workers wait for the sum and go on from the new center.

    Args:
        algorithm: what an exchange does: the name of a rule ("easgd", "local_sgd", "downpour",
            "post_local_sgd", "mdownpour", "slowmo", "bmuf", "diloco", "sma", "leader_sgd",
            "delayed_sgd") or a Rule with options of its own. None: "easgd", or the server's.
        tau: communication period τ, in optimizer steps: a whole number, a callable of the
            optimizer step, a Schedule (see schedules/), or "auto": the smallest from 1 to 64 at
            which exchanges hide behind training, found by measuring (see automatic.py). Other
            bounds are said by Auto(min=, max=). Behind a server "even": each worker's own, in
            proportion to its speed. None: 10, what the rule is limited to, or the server's.
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
        often: Often(tau=2, below=100_000): parameters of fewer elements are exchanged every 2
            steps, in full precision, and the others every ``tau``. For rules that pull. None: all
            are exchanged every ``tau`` steps.
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
        center: address of a server that has the center ("host:5700", or a list of those that may
            take its place, or CenterAt(...) with keys): asynchronous EASGD. This worker exchanges
            with it at its own pace, and waits for nobody. It takes the strength from it, and what
            is not given here of algorithm, τ and average; what is given may not contradict it.
            "local", also Trainer(strategy="easgd_async"): worker 0 starts such a server for the
            workers of this machine. None: all workers hold the center, and exchange together.
        bucket_bytes: the most that one all-reduce carries, in bytes. With ``often`` those of large
            parameters carry no more than all small ones have, or 128 KiB if these have less.
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

    Attributes:
        telemetry: what exchanges cost and found; of the fit under way, or of the latest one.

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
        algorithm: str | Rule | None = None,
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
        often: Often | None = None,
        groups: Members | Groups | None = None,
        center_device: Literal["cpu"] | None = None,
        center_average: Literal["polyak", "ema"] | CenterAverage | None = None,
        center: str | Sequence[str] | CenterAt | None = None,
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
        given = locals()  # so that an option of the exchanges is handed on by its name
        refuse(unsupported, of=type(self))
        require_choice("evaluate_on", evaluate_on, get_args(EvaluateOn))
        require_bools(strict_resume=strict_resume)
        shared = {name: given[name] for name in given.keys() & signature(Options).parameters}
        options = Options(**shared, log=rank_zero_info)
        super().__init__(
            options,
            validates_center=evaluate_on == "center",
            strict_resume=strict_resume,
            exchange_timeout=require_duration("exchange_timeout", exchange_timeout),
            timeout=require_timedelta("timeout", timeout),
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        names: dict[str, dict[str, Any]] = {name: {"algorithm": name} for name in RULES}
        names |= AVERAGED
        for name in ("easgd", "downpour", "mdownpour", *AVERAGED):
            names[f"{name}_async"] = {**names[name], "center": "local"}
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
    def _configure_launcher(self) -> None:
        refuse_devices(self.parallel_devices or [])
        super()._configure_launcher()
        assert self.cluster_environment is not None
        if self.solo and self._start_method == "popen":
            self._launcher = SoloLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes
            )
        elif self._start_method != "popen":
            self._launcher = ForkingLauncher(self, start_method=self._start_method)
        assert self._launcher is not None
        if not self._launcher.is_interactive_compatible:
            refuse_in_notebooks(self.options.name + ("_async" if self.solo else ""))

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
