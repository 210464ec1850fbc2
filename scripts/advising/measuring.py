"""Short fits of the user's module on the user's network, one after another in the same workers."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig

from advising.judging import Exchanges, Measured, Trial, together
from lightning_easgd import Auto, EASGDStrategy, Often
from lightning_easgd.communication import gather
from lightning_easgd.schedules import Durations, require_often
from lightning_easgd.workloads import experiment

NEVER = 10**9
"""A period τ that no run reaches."""

_REPETITIONS, _LONGEST_SECONDS, _LATE = 4, 5.0, 0.75
_WARM_UP_STEPS, _FEWEST_STEPS, _OUTLIER = 3, 5, 3
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
        self._budget = seconds
        self._ends: list[float] = []
        self._last = NEVER

    @property
    def seconds(self) -> float:
        """Of a step, the mean."""
        ends = self._measured
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    @property
    def spread_seconds(self) -> float:
        """The standard deviation between steps, but for what is something else than a step."""
        ends = self._measured
        steps = [after - before for before, after in pairwise(ends)]
        longest = _OUTLIER * statistics.median(steps)
        return statistics.stdev(min(seconds, longest) for seconds in steps)

    @property
    def _measured(self) -> list[float]:
        return self._ends[_WARM_UP_STEPS:]  # after that the workers waited for each other

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After a batch, which need not be a step."""
        step = trainer.global_step
        if step == len(self._ends):
            return
        self._ends.append(self._now(trainer, exactly=step in (_WARM_UP_STEPS + 1, self._last)))
        if step == _WARM_UP_STEPS:
            expected = (self._ends[-1] - self._ends[0]) / (_WARM_UP_STEPS - 1)
            count = max(_FEWEST_STEPS, round(self._budget / expected))
            self._last = step + trainer.strategy.broadcast(count)
        if step == self._last:
            trainer.should_stop = True

    def _now(self, trainer: pl.Trainer, *, exactly: bool) -> float:
        if exactly and trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Rounds(pl.Callback):
    """Ends a fit at its n-th exchange, which all workers begin at the same step.

    Args:
        count: n.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.sent_bytes = 0
        self.durations = Durations()
        self.tau = 0
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
            self.tau = telemetry.tau
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
        self._datamodule = instantiate(cfg.data) if cfg.get("data") else None
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
        self.is_rank_zero: bool = trainer.is_global_zero
        self.writes: bool = trainer.local_rank == 0
        self.fragments: int = cfg.strategy.fragments
        self.often: Often = instantiate(cfg.strategy.often) or Often(below=0)
        tau = cfg.strategy.tau
        auto = Auto.of(instantiate(tau) if isinstance(tau, DictConfig) else tau) or Auto()
        self.tau_bounds = (auto.min, auto.max)
        self.module: pl.LightningModule
        self._began = time.monotonic()

    def easgd(self, **options: Any) -> EASGDStrategy:
        """The strategy that is configured, with other options; all parameters at one period."""
        given = {"final_exchange": False, "often": None, **options}
        return instantiate(self._cfg.strategy, **given)

    def ddp(self) -> Strategy:
        """DDP over the same backend."""
        return DDPStrategy(process_group_backend=self._cfg.strategy.process_group_backend)

    def fit(self, strategy: Strategy, watch: pl.Callback, what: str) -> None:
        """A fit from the first weights on, until the callback ends it."""
        if self.is_rank_zero:
            elapsed = time.monotonic() - self._began
            print(f"  [{elapsed:3.0f} of {self._cfg.seconds} s] measuring {what}", flush=True)
        experiment.seed(self._cfg.seed)
        constant = {"schedule": "constant"} if "schedule" in self._cfg.module else {}
        self.module = instantiate(self._cfg.module, **constant)
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


@dataclass
class Repetition:
    """Every kind of fit, once."""

    step_seconds: float
    spread_seconds: float
    ddp_step_seconds: float
    trials: list[Trial]
    ddp_sent_bytes: int


def measure(bench: Bench, seconds: float, codecs: Sequence[str]) -> Measured:
    """Steps without exchanges, steps of DDP, and exchanges in every form, in turn.

    Args:
        bench: with the module and the network.
        seconds: that all may take; longer if a few steps and exchanges of each kind do.
        codecs: besides full precision, the most exact first.
    """
    forms: list[str | None] = [None, *codecs]
    share = min(_LONGEST_SECONDS, seconds / (_REPETITIONS * (2 + len(forms))))
    done: list[Repetition] = []
    taken, began = 0.0, time.monotonic()
    # Once is enough only where it takes too long: one time says little of the noise.
    while taken < _LATE * seconds and (len(done) < 2 or taken * (1 + 1 / len(done)) < seconds):
        done.append(_repetition(bench, forms, share))
        taken = gather(time.monotonic() - began)[0]
    trained = [p for p in bench.module.parameters() if p.requires_grad]
    return Measured(
        model=type(getattr(bench.module, "net", bench.module)).__name__,
        parameters=sum(p.numel() for p in trained),
        copy_bytes=sum(p.numel() * max(4, p.itemsize) for p in trained),
        workers=bench.workers,
        device=bench.device,
        fragments=bench.fragments,
        sizes=[p.numel() for p in trained],
        often_tau=bench.often.tau,
        pause=bench.often.tau if require_often(bench.often) else 1,
        tau_bounds=bench.tau_bounds,
        step_seconds=statistics.median(once.step_seconds for once in done),
        spread_seconds=statistics.median(once.spread_seconds for once in done),
        ddp_step_seconds=statistics.median(once.ddp_step_seconds for once in done),
        ddp_sent_bytes=done[0].ddp_sent_bytes,
        exchanges=[
            Exchanges(form, [once.trials[i] for once in done]) for i, form in enumerate(forms)
        ],
    )


def _repetition(bench: Bench, forms: Sequence[str | None], seconds: float) -> Repetition:
    unlinked = bench.easgd(tau=NEVER)
    alone, under_ddp = Steps(seconds), Steps(seconds)
    bench.fit(unlinked, alone, "steps without exchanges")
    bench.fit(bench.ddp(), under_ddp, "steps of DDP")
    step, ddp_step = max(gather(alone.seconds)), max(gather(under_ddp.seconds))
    # DDP moves what a full exchange moves, so the one waits about as long as the other.
    rounds = round(seconds / max(_STEPS_BETWEEN * step, ddp_step))
    rounds = min(max(rounds, _FEWEST_ROUNDS), _MOST_ROUNDS)
    most_steps = max(_FEWEST_STEPS_BETWEEN, int(seconds / rounds / step))
    return Repetition(
        step_seconds=step,
        spread_seconds=max(gather(alone.spread_seconds)),
        ddp_step_seconds=ddp_step,
        trials=[_trial(bench, form, rounds, most_steps) for form in forms],
        ddp_sent_bytes=unlinked.telemetry.ddp_bytes_per_step,
    )


def _trial(bench: Bench, form: str | None, rounds: int, most_steps: int) -> Trial:
    """Exchanges in one form.

    They follow each other as with ``tau="auto"``: neither waiting for the one before, if there is
    time for that, nor so rarely that what they cost is lost in the noise of many steps.
    """
    strategy = bench.easgd(
        compression=form,
        tau=Auto(
            min=_FEWEST_STEPS_BETWEEN * bench.fragments,
            max=most_steps * bench.fragments,
        ),
    )
    watch = Rounds(rounds)
    bench.fit(strategy, watch, f"exchanges in {form or 'full precision'}")
    return Trial(
        together([Durations(*each) for each in gather(astuple(watch.durations))]),
        round_steps=watch.tau // bench.fragments,
        sent_bytes=bench.fragments * watch.sent_bytes,
    )
