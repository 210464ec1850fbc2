"""What a run was, reached and cost: as a table for the terminal, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from lightning_easgd import EASGDStrategy, Telemetry

_WORTH_A_LINE, _SHOWN, _STANDS_OUT = 0.01, 0.1, 2.0
"""A straggler was waited for longer than this share of training, than these seconds, which are what
the line can show, and so many times as long as the others."""

_FEW = 8
"""So many workers have a number each in the table."""

_COUNTED = (
    *("tau", "exchanges", "exchanges_often", "bytes_sent", "bytes_inside", "bytes_often"),
    *("ddp_bytes_sent", "staleness", "wait_seconds"),
    *("worker_wait_seconds", "worker_awaited_seconds"),
)


class Stopwatch(Callback):
    """Takes the time of training, and counts what this worker trains on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """From the first batch to the last, validations and checkpoints among them."""
        self.samples = 0
        """Of this worker; 0 if batches do not tell."""
        self.learning_rate: float | None = None
        """That of the first parameter group at the start, before a schedule changes it."""
        self._began = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()
        for optimizer in trainer.optimizers[:1]:
            group = optimizer.param_groups[0]
            self.learning_rate = float(group.get("initial_lr", group["lr"]))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.samples += samples_of(batch)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began


def samples_of(batch: Any) -> int:
    """Samples in a batch: rows of the first tensor in it; 0 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | Sequence) or isinstance(batch, str):
        return 0
    return next(filter(None, map(samples_of, parts)), 0)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run was, reached and cost. Bytes and seconds are of this node's first worker."""

    strategy: str
    """The name of the rule, or of Lightning's strategy."""
    workers: int
    tau: int | None = None
    """The one in force at the end."""
    strength: str | None = None
    """The one of β, α and ρ that was set, for a rule that pulls."""
    rule: str | None = None
    """With its options."""
    learning_rate: float | None = None
    """At the start."""
    model: str = ""
    parameters: int = 0
    data: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    tested: Mapping[str, float] = field(default_factory=dict)
    """What ``trainer.test`` returned."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """What training and validation logged last."""
    steps: int = 0
    train_seconds: float | None = None
    """From the first batch to the last, validations and checkpoints among them."""
    samples_per_second: float | None = None
    """Of all workers, if they train on as many as the first, in these seconds."""
    exchanges: int | None = None
    exchanges_often: int | None = None
    """Of the parameters that are exchanged often, besides."""
    bytes_sent: int | None = None
    """Counted under EASGD; computed of the steps and gradients under DDP."""
    bytes_inside: int | None = None
    """Of those, to workers of its own group."""
    bytes_often: int | None = None
    """Of those, for parameters that are exchanged often."""
    ddp_bytes_sent: int | None = None
    staleness: float | None = None
    """How often the center moved between the first worker's getting it and the adding of its
    difference, the mean, if a server has the center."""
    wait_seconds: float | None = None
    """Those of runs that this one went on from included, as all that is counted above."""
    worker_wait_seconds: list[float] = field(default_factory=list)
    """Waited by each worker in this run, in rank order."""
    worker_awaited_seconds: list[float] = field(default_factory=list)
    """Others waited so long for each worker in this run, in rank order."""
    checkpoint: str | None = None
    pruned: bool = False
    """Whether a search ended it early, so that it was not tested."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """The report for a terminal."""
        whose = ", of the center" if self.exchanges is not None else ""
        rows = [
            *self._what(),
            *((name, f"{value:.5g}{whose}") for name, value in self.tested.items()),
            *self._costs(),
            ("checkpoint", self.checkpoint or "none written"),
            *([("ended early", "by the search, without a test")] if self.pruned else []),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    def _what(self) -> list[tuple[str, str]]:
        settings = [self.strategy, f"tau={self.tau}" if self.tau else "", self.strength or ""]
        settings += [f"lr={self.learning_rate:g}" if self.learning_rate is not None else ""]
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        plain = self.rule is None or self.rule == _plain_rule(self.strategy)
        return [
            ("strategy", ", ".join(filter(None, settings))),
            *([] if plain else [("rule", str(self.rule))]),
            ("model", f"{self.model}, {self.parameters:,} parameters"),
            ("data", ", ".join([self.data, *seed])),
            ("workers", f"{self.workers}, {self.steps} steps each"),
        ]

    def _costs(self) -> list[tuple[str, str]]:
        rows = []
        if self.train_seconds:
            speed = self.samples_per_second
            rate = f", {speed:,.0f} samples/s" if speed else ""
            rows.append(("trained", f"{self.train_seconds:.1f} s{rate}"))
        if self.exchanges is not None:
            often = f", and {self.exchanges_often} of small parameters"
            rows.append(("exchanges", f"{self.exchanges}{often if self.exchanges_often else ''}"))
        if self.staleness is not None:
            moved = f"the center moved {self.staleness:.1f} times between get and add"
            rows.append(("staleness of worker 0", moved))
        if self.bytes_sent is not None:
            rows += self._sent(self.bytes_sent)
        return rows + self._waited() + self._straggler()

    def _waited(self) -> list[tuple[str, str]]:
        waits = sorted(self.worker_wait_seconds)
        if self.staleness is not None and self.wait_seconds is not None:
            return [("waited by worker 0", f"{self.wait_seconds:.2f} s, for the server")]
        if not waits or not self.train_seconds:
            return []
        if len(waits) <= _FEW:
            shown = ", ".join(f"{wait:.2f}" for wait in self.worker_wait_seconds)
        else:
            shown = f"{waits[0]:.2f} to {waits[-1]:.2f}"
        return [("waited by each worker", f"{shown} of {self.train_seconds:.1f} s")]

    def _sent(self, sent: int) -> list[tuple[str, str]]:
        if self.bytes_inside:  # the first worker of a group sends more than others
            return [
                ("sent by worker 0", self._amount(sent)),
                ("  of that, to other groups", self._amount(sent - self.bytes_inside)),
            ]
        amount = f"{sent / 1e6:.2f} MB, computed" if self.exchanges is None else self._amount(sent)
        small = [("  of that, for small parameters", self._amount(self.bytes_often or 0))]
        return [("sent by each worker", amount), *(small if self.bytes_often else [])]

    def _straggler(self) -> list[tuple[str, str]]:
        """The worker that stands out as the one that the others waited for."""
        awaited, total = self.worker_awaited_seconds, self.train_seconds or 0.0
        *others, longest = sorted(awaited) or [0.0]
        usual = statistics.median(others) if others else 0.0
        if longest <= max(_WORTH_A_LINE * total, _SHOWN, _STANDS_OUT * usual):
            return []
        worker = awaited.index(longest)
        return [(f"worker {worker} was waited for", f"{longest:.1f} of {total:.1f} s")]

    def _amount(self, sent: int) -> str:
        amount = f"{sent / 1e6:.2f} MB"
        if self.ddp_bytes_sent:
            share = sent / self.ddp_bytes_sent
            amount += f", {100 * share:.1f} % of DDP's {self.ddp_bytes_sent / 1e6:.2f} MB"
        return amount


def describe(
    trainer: pl.Trainer, module: pl.LightningModule, data: object, stopwatch: Stopwatch | None
) -> dict[str, Any]:
    """What a run was and cost, as fields of a report.

    Args:
        trainer: that has run.
        module: that it ran.
        data: where the batches came from; None: from the module.
        stopwatch: of training; None if there was none.
    """
    return {
        "workers": trainer.world_size,
        "model": name_model(module),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "data": type(module if data is None else data).__name__,
        "seed": _seed(),
        "versions": _versions(),
        "steps": trainer.global_step,
        **_describe_strategy(trainer),
        **(_describe_training(trainer, module, stopwatch) if stopwatch else {}),
    }


def name_model(module: pl.LightningModule) -> str:
    """The class of a module; and of the network, if it wraps one."""
    parts = [p for p in module.children() if any(True for _ in p.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    name = type(module).__name__
    return f"{name} of {type(parts[0]).__name__}" if len(parts) == 1 and not own else name


def _plain_rule(strategy: str) -> str:
    """What a strategy of this name says of its rule where no option of that is given."""
    with suppress(ValueError):  # it is a rule of the user's, or one with a running average
        return str(EASGDStrategy(algorithm=strategy.removesuffix("_async")).options.rules.algorithm)
    return f"{strategy}()"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("lightning", "lightning-easgd"):
        with suppress(PackageNotFoundError):  # it may run from a folder
            found[name] = version(name)
    return found


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None


def _describe_strategy(trainer: pl.Trainer) -> dict[str, Any]:
    strategy = trainer.strategy
    if not isinstance(strategy, EASGDStrategy):
        plain = type(strategy).__name__.removesuffix("Strategy").lower()  # DDP's has no name
        return {"strategy": getattr(strategy, "strategy_name", plain)}
    options = strategy.options
    known = options.center is None or options.center.is_local  # another server does not say its β
    strength = known and options.rules.algorithm.elastic
    return {
        "strategy": options.rule_name,
        "rule": str(options.rules.algorithm),
        "strength": str(options.rules.strength) if strength else None,
    }


def _describe_training(
    trainer: pl.Trainer, module: pl.LightningModule, stopwatch: Stopwatch
) -> dict[str, Any]:
    samples = stopwatch.samples * trainer.world_size
    return {
        "learning_rate": stopwatch.learning_rate,
        "train_seconds": stopwatch.seconds,
        "samples_per_second": samples / stopwatch.seconds if samples else None,
        **count_bytes(trainer, module),
    }


def count_bytes(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What this worker sent, and DDP would have: fields of a report; none if it did not train so.

    Args:
        trainer: that has trained.
        module: that it trained.
    """
    telemetry = getattr(trainer.strategy, "telemetry", None)
    if isinstance(telemetry, Telemetry):
        return {name: getattr(telemetry, name) for name in _COUNTED}
    if not isinstance(trainer.strategy, DDPStrategy):
        return {}
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    workers = trainer.world_size
    sent = 2 * (workers - 1) * gradients // workers * trainer.global_step
    return {"bytes_sent": sent, "ddp_bytes_sent": sent}
