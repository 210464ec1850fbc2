"""Tests of the delivered model on the way, while the clock of training stands still."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from comparing.center import is_apart
from comparing.meeting import Meeting
from comparing.peers import HookedDDP
from comparing.result import Point, WorkerTime
from lightning_easgd.workloads.report import count_bytes, samples_of


class Watch(pl.Callback):
    """Has Lightning validate at equally spaced moments of a fit, and keeps what it finds.

    Strategies show what they deliver in validation, as to any user. Must be the last callback.

    Args:
        points: how many moments there are, the end not counted; it is not among them.
        metric: the number that validation logs and that is kept.
    """

    def __init__(self, points: int, metric: str) -> None:
        self._wanted, self._metric = points, metric
        self.points: list[Point] = []
        """Of this worker."""
        self.seconds = 0.0
        """Of training so far."""
        self._samples = 0
        self._batches = 0
        self._last: float | None = None
        self._began: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When everything is set up."""
        self._last = trainer.num_training_batches * (trainer.max_epochs or 1)
        every = self._last / (self._wanted + 1)
        divided = self._wanted and math.isfinite(every)
        # The trainer's own option is an interval, and how long training is, is known only now.
        trainer.val_check_batch = max(1, round(every)) if divided else sys.maxsize
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, batch: Any, __: int) -> None:
        """Before each batch."""
        self._samples += samples_of(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After each batch."""
        self._batches += 1
        if self._batches == self._last:
            trainer.val_check_batch = sys.maxsize  # the end has a test of its own

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop()
            self._sent = sent_bytes(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was found, and let the clock go on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.keep(trainer, trainer.callback_metrics)
            self._began = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock once what is delivered is there."""
        self._stop()
        self._sent = sent_bytes(trainer, pl_module)

    def _stop(self) -> None:
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self._began = None

    def keep(self, trainer: pl.Trainer, tested: Mapping[str, Any]) -> float:
        """Add a point, by what the last test found; its score.

        Raises:
            ValueError: there is no such number.
        """
        if self._metric not in tested:
            raise ValueError(
                f"metric got {self._metric!r}; allowed is what validation logs:"
                f" {', '.join(sorted(tested)) or 'nothing, so log a number in it'}."
            )
        score = float(tested[self._metric])
        self.pass_by(trainer, score if math.isfinite(score) else None)
        return score

    def pass_by(self, trainer: pl.Trainer, score: float | None = None) -> None:
        """Add a point; its score is that of who tested, if that was another worker."""
        telemetry = getattr(trainer.strategy, "telemetry", None)
        distance = getattr(telemetry, "consensus_distance", None)
        step, sent = trainer.global_step, self._sent
        self.points.append(Point(self.seconds, step, self._samples, sent, score, distance))

    def time_of(self, trainer: pl.Trainer, host: str) -> WorkerTime:
        """Where this worker's time went."""
        telemetry = getattr(trainer.strategy, "telemetry", None)
        if telemetry is None:
            return WorkerTime(host, self.seconds)
        waited, exchanges = telemetry.wait_seconds, telemetry.exchanges
        hidden = max(0.0, exchanges * telemetry.exchange_seconds - waited)
        return WorkerTime(host, self.seconds, waited, hidden, telemetry.step_seconds)


class WatchApart(Watch):
    """Of workers that wait for nobody: worker 0 tests, and the others wait meanwhile.

    So the clock can stand still for all, and what they share of the machine is worker 0's.

    Args:
        points: as of Watch.
        metric: as of Watch.
        meeting: of the workers.
    """

    def __init__(self, points: int, metric: str, meeting: Meeting) -> None:
        super().__init__(points, metric)
        self._meeting = meeting

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop all clocks."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._meeting.raise_flag(f"test {len(self.points)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was found, and let all go on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._meeting.raise_flag(f"tested {len(self.points)}")
        super().on_validation_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, batch: Any, __: int) -> None:
        """Before each batch."""
        number = len(self.points)
        if self._meeting.rank and self._meeting.sees_flag(f"test {number}"):
            self._stop()
            self._sent = sent_bytes(trainer, trainer.lightning_module)
            self.pass_by(trainer)
            self._meeting.await_flag(f"tested {number}")
            self._began = time.perf_counter()
        super().on_train_batch_start(trainer, _, batch, __)


def sent_bytes(trainer: pl.Trainer, module: pl.LightningModule) -> float | None:
    """What this worker sent so far, and what a server sent to it; None if nobody counts it."""
    sent: int | None = count_bytes(trainer, module).get("bytes_sent")
    if sent is not None and is_apart(trainer.strategy):
        return sent + trainer.strategy.telemetry.bytes_received
    halved = isinstance(trainer.strategy, HookedDDP)  # gradients travel in 16 bits
    return sent / 2 if halved and sent is not None else sent
