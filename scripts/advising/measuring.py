"""Short fits of the user's module on the user's network, one after another in the same workers."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig

from advising.judging import Exchanges, Measured, together
from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import gather
from lightning_easgd.pace import TAU_MAX, TAU_MIN, Durations
from lightning_easgd.workloads import experiment

NEVER = 10**9
"""A period τ that no run reaches."""

_REPETITIONS, _LONGEST_SECONDS = 4, 5.0
_SETTLED_STEPS, _WARM_UP_STEPS, _FEWEST_STEPS = 2, 5, 5
_FEWEST_ROUNDS, _MOST_ROUNDS = 4, 18  # after 18, tau="auto" may measure afresh
_STEPS_BETWEEN, _FEWEST_STEPS_BETWEEN = 10, 4
_BARE = {
    "max_epochs": -1,
    "max_steps": -1,
    "max_time": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Steps(pl.Callback):
    """Times optimizer steps; ends the fit after the same number of them on all workers.

    Args:
        seconds: that the steps may take together.
    """

    def __init__(self, seconds: float) -> None:
        self.step_seconds = math.nan
        self._seconds = seconds
        self._seen, self._last = 0, NEVER
        self._began = math.nan

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After a batch, which need not be a step."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step in (_SETTLED_STEPS, _WARM_UP_STEPS, self._last):
            elapsed = self._lap(trainer)
        if step == _WARM_UP_STEPS:
            expected = elapsed / (_WARM_UP_STEPS - _SETTLED_STEPS)
            count = max(_FEWEST_STEPS, round(self._seconds / expected))
            self._last = step + trainer.strategy.broadcast(count)
            self._lap(trainer)
        elif step == self._last:
            self.step_seconds = elapsed / (step - _WARM_UP_STEPS)
            trainer.should_stop = True

    def _lap(self, trainer: pl.Trainer) -> float:
        """Seconds since the last call."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        before, self._began = self._began, time.perf_counter()
        return self._began - before


class Rounds(pl.Callback):
    """Ends a fit at its n-th exchange, which all workers begin at the same step.

    Args:
        count: n.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.sent_bytes = 0
        self.durations = Durations()
        self._before: int | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After a batch."""
        telemetry = trainer.strategy.telemetry
        if telemetry.exchanges == 1 and self._before is None:
            self._before = telemetry.bytes_sent
        if telemetry.exchanges == self.count and not trainer.should_stop:
            assert self._before is not None
            self.sent_bytes = (telemetry.bytes_sent - self._before) // (self.count - 1)
            self.durations = Durations(
                step=math.ceil(1e6 * telemetry.step_seconds),
                exchange=math.ceil(1e6 * telemetry.exchange_seconds),
                cost=math.ceil(1e6 * telemetry.exchange_cost_seconds),
            )
            trainer.should_stop = True


class Bench:
    """Fits the module that is configured, with one strategy after another.

    Args:
        cfg: of advise.py.

    Raises:
        ValueError: the strategy is not EASGD, there is one worker only, no time, or no such codec.
    """

    def __init__(self, cfg: DictConfig) -> None:
        for package in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(package).setLevel(logging.ERROR)
        # Lightning 2.6 on newer torch; and its advice on loaders, which is not asked for here.
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        self._cfg = cfg
        self._datamodule = instantiate(cfg.data)
        self._require_sense()
        trainer = self._trainer(self.easgd(tau="auto"))
        experiment.require_all_processes(trainer)
        if trainer.world_size == 1:
            raise ValueError(
                "One worker has nobody to exchange with, so there is nothing to measure. Set"
                " trainer.devices or trainer.num_nodes; or train alone with strategy=single."
            )
        self.workers: int = trainer.world_size
        self.device: str = trainer.strategy.root_device.type
        self.speaks: bool = trainer.is_global_zero
        self.writes: bool = trainer.local_rank == 0
        self.fragments: int = cfg.strategy.fragments
        self.tau_bounds = (cfg.strategy.tau_min or TAU_MIN, cfg.strategy.tau_max or TAU_MAX)
        self.module: pl.LightningModule
        self._began = time.monotonic()

    def easgd(self, **options: Any) -> EASGDStrategy:
        """The strategy that is configured, with other options."""
        limits = {"tau_min": None, "tau_max": None} if options.get("tau") != "auto" else {}
        options = {"final_exchange": False, **limits, **options}
        return instantiate(self._cfg.strategy, **options)

    def ddp(self) -> Strategy:
        """DDP over the same backend."""
        return DDPStrategy(process_group_backend=self._cfg.strategy.process_group_backend)

    def fit(self, strategy: Strategy, watch: pl.Callback, what: str) -> None:
        """A fit from the first weights on, until the callback ends it."""
        if self.speaks:
            elapsed = time.monotonic() - self._began
            print(f"  [{elapsed:3.0f} of {self._cfg.seconds} s] measuring {what}", flush=True)
        experiment.seed(self._cfg.seed)
        self.module = instantiate(self._cfg.module, schedule="constant")
        seeds = experiment.SeedWorkers(self._cfg.seed)
        trainer = self._trainer(strategy, callbacks=[seeds, watch])
        trainer.fit(self.module, datamodule=self._datamodule)

    def _require_sense(self) -> None:
        strategy, seconds = self._cfg.strategy._target_, self._cfg.seconds
        if not issubclass(get_class(strategy), EASGDStrategy):
            raise ValueError(
                f"advise.py measures EASGD and DDP, and got {strategy}. Leave strategy=... out, or"
                " set strategy=easgd or strategy=eamsgd."
            )
        if not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ValueError(f"seconds={seconds!r} is not allowed. Allowed: a number above 0.")
        for codec in self._cfg.codecs:
            self.easgd(tau="auto", compression=codec)

    def _trainer(self, strategy: Strategy, **options: Any) -> pl.Trainer:
        return instantiate(self._cfg.trainer, strategy=strategy, **_BARE, **options)


def measure(bench: Bench, seconds: float, codecs: Sequence[str]) -> Measured:
    """Steps without exchanges, steps of DDP, and exchanges in every form, in turn.

    Args:
        bench: with the module and the network.
        seconds: that all may take; longer if a few steps and exchanges of each kind do.
        codecs: besides full precision, the most exact first.
    """
    forms: list[str | None] = [None, *codecs]
    share = min(_LONGEST_SECONDS, seconds / (_REPETITIONS * (2 + len(forms))))
    alone: list[float] = []
    ddp: list[float] = []
    found: dict[str | None, list[Durations]] = {form: [] for form in forms}
    sent: dict[str | None, int] = {}
    began = time.monotonic()
    while True:
        unlinked = bench.easgd(tau=NEVER)
        alone.append(_step_seconds(bench, unlinked, share, "steps without exchanges"))
        ddp.append(_step_seconds(bench, bench.ddp(), share, "steps of DDP"))
        for form in forms:
            # DDP moves what a full exchange moves, so the one waits about as long as the other.
            count = round(share / max(_STEPS_BETWEEN * alone[-1], ddp[-1]))
            watch = Rounds(min(max(count, _FEWEST_ROUNDS), _MOST_ROUNDS))
            most_steps = max(_STEPS_BETWEEN, int(share / watch.count / alone[-1]))
            found[form].append(_durations(bench, form, watch, most_steps))
            sent[form] = bench.fragments * watch.sent_bytes
        repetitions, (taken, *_) = len(alone), gather(time.monotonic() - began)
        if taken * (repetitions + 1) / repetitions > seconds:
            break
    trained = [p for p in bench.module.parameters() if p.requires_grad]
    return Measured(
        model=type(bench.module.net).__name__,
        parameters=sum(p.numel() for p in trained),
        copy_bytes=sum(p.numel() * max(4, p.itemsize) for p in trained),
        workers=bench.workers,
        device=bench.device,
        fragments=bench.fragments,
        tau_bounds=bench.tau_bounds,
        step_seconds=statistics.median(alone),
        ddp_step_seconds=statistics.median(ddp),
        ddp_sent_bytes=unlinked.telemetry.ddp_bytes_per_step,
        exchanges=[Exchanges(form, sent[form], found[form]) for form in forms],
    )


def _step_seconds(bench: Bench, strategy: Strategy, seconds: float, what: str) -> float:
    """A step, of the slowest worker."""
    watch = Steps(seconds)
    bench.fit(strategy, watch, what)
    return max(gather(watch.step_seconds))


def _durations(bench: Bench, form: str | None, watch: Rounds, most_steps: int) -> Durations:
    """What exchanges took, as all workers together see it.

    They follow each other as with ``tau="auto"``: neither waiting for the one before, if there is
    time for that, nor so rarely that what they cost is lost in the noise of many steps.
    """
    strategy = bench.easgd(
        compression=form,
        tau="auto",
        tau_min=_FEWEST_STEPS_BETWEEN * bench.fragments,
        tau_max=most_steps * bench.fragments,
    )
    bench.fit(strategy, watch, f"exchanges in {form or 'full precision'}")
    return together(gather(watch.durations))
