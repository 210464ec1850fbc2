"""What the exchanges cost and found: in Lightning's loggers and its progress bar, and in warnings.

[Note: drift] A worker's distance from the center is measured in lengths of the center. Below 1, all
workers have most of their weights in common. In the scripts' default run, which trains well, it
rises from 0.10 to 0.28 in the first rounds; so that it grows says nothing by itself. Above 1, what
a worker has for itself is more than what all share, and their mean is a network that none is near.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_easgd.strategy.lightning_internals import LoopHooks, show_in_bar
from lightning_easgd.strategy.strategy import EASGDStrategy
from lightning_easgd.telemetry import Telemetry

_FAR, _FAR_ROUNDS = 1.0, 3
_ROUNDS, _ROUNDS_SECONDS, _WAITED = 10, 5.0, 1 / 3
"""In more than half of so many rounds, which take so long at least, such a part of it is waited."""


class EASGDMonitor(Callback):
    """Logs the telemetry of worker 0 as ``easgd/...``, in the rows that Lightning logs anyway.

    All loggers get it, every ``log_every_n_steps`` batches and at the end of an epoch. Causes no
    communication: the counters are the worker's own. Warns, once each, when workers drift apart and
    when exchanges do not hide behind training. Under another strategy it warns, and does nothing.

    Args:
        progress_bar: whether Lightning's progress bar shows τ, the bytes sent as a share of DDP's,
            and the share of the time that worker 0 has waited.
    """

    def __init__(self, *, progress_bar: bool = False) -> None:
        self._progress_bar = progress_bar
        self._hooks: LoopHooks | None = None
        self._watched: _Watched | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._watched = None
        if not isinstance(trainer.strategy, EASGDStrategy):
            rank_zero_warn(
                f"EASGDMonitor does nothing under {type(trainer.strategy).__name__}. It logs what"
                " EASGDStrategy counts: remove the callback or set Trainer(strategy='easgd')."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, EASGDStrategy) and trainer.is_global_zero:
            self._watched = _Watched(trainer.strategy.telemetry)
            self._hooks = LoopHooks(trainer)
            self._hooks.add_to_rows(self._watched.metrics)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._watched is not None:
            self._watched.look()
            if self._progress_bar:
                show_in_bar(trainer, "exchanges", self._watched.shown)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._hooks is not None:
            self._hooks.restore()
        self._hooks = self._watched = None


class _Watched:
    """Telemetry of a fit under way, looked at after every exchange."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._exchanges, self._far, self._warned = -1, 0, set[str]()
        self._began, self._waited_before = time.perf_counter(), telemetry.wait_seconds
        self._rounds = deque([(self._began, self._waited_before)], maxlen=_ROUNDS + 1)
        self.shown = ""
        """In the progress bar."""

    def metrics(self) -> dict[str, float]:
        """For the loggers, with the seconds since training began."""
        found = {"seconds": time.perf_counter() - self._began, **self._telemetry.metrics()}
        return {f"easgd/{name}": value for name, value in found.items()}

    def look(self) -> None:
        """Take in the latest exchange, if it is new."""
        if self._telemetry.exchanges != self._exchanges:
            self._exchanges = self._telemetry.exchanges
            self._rounds.append((time.perf_counter(), self._telemetry.wait_seconds))
            self.shown = self._show()
            self._look_at_the_distance()
            self._look_at_the_waits()

    def _show(self) -> str:
        counted, (now, waited) = self._telemetry, self._rounds[-1]
        texts = [f"τ {counted.tau}"]
        if counted.ddp_bytes_sent:
            texts.append(
                f"{100 * counted.bytes_sent / counted.ddp_bytes_sent:.3g} % of DDP's bytes"
            )
        if counted.staleness is not None:
            texts.append(f"staleness {counted.staleness:.1f}")
        share = (waited - self._waited_before) / max(now - self._began, 1e-9)
        return " · ".join([*texts, f"waited {100 * share:.1f} %"])

    def _look_at_the_distance(self) -> None:
        distance = self._telemetry.consensus_distance
        self._far = self._far + 1 if distance > _FAR else 0
        if self._far >= _FAR_ROUNDS:
            self._warn(
                f"Workers drift apart: at {_FAR_ROUNDS} exchanges one after the other, worker 0 was"
                f" farther from the center than the center is long (‖x - c‖/‖c‖ = {distance:.2f})."
                " Their mean may be no good network. Lower tau or the learning rate, or raise beta"
                " where a rule pulls."
            )

    def _look_at_the_waits(self) -> None:
        (began, before), (now, waited) = self._rounds[0], self._rounds[-1]
        share = (waited - before) / max(now - began, 1e-9)
        long = [wait > _WAITED * took for took, wait in self._took_and_waited()]
        if sum(long) > _ROUNDS / 2 and now - began > _ROUNDS_SECONDS:
            self._warn(
                f"Exchanges do not hide behind training: worker 0 has waited {100 * share:.0f} % of"
                f" the latest {len(long)} rounds. If one worker stands out in"
                " telemetry.worker_awaited_seconds, look at its machine. Else raise tau (now"
                f" {self._telemetry.tau}) or set tau='auto' or compression='int8'."
            )

    def _took_and_waited(self) -> list[tuple[float, float]]:
        """Of each of the latest rounds, in seconds."""
        return [(now - at, waited - w) for (at, w), (now, waited) in pairwise(self._rounds)]

    def _warn(self, text: str) -> None:
        kind, _, _ = text.partition(":")
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(text)
