"""Strike a training run at random, again and again, and check that nothing is ever lost or changed.

Trains a small workload once undisturbed. Then trains it again, and in every round a random worker
gets a random signal at a random step, or a few milliseconds later, so that strikes fall into saves
as well; all workers end, and the next round resumes from the newest checkpoint. Every checkpoint
file that has its final name must be whole, and the center delivered at the end must have the bits
of the undisturbed run. A run that ends before the rounds do is compared and followed by another.

python scripts/chaos.py --rounds 100 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from launching import free_port
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_easgd import EASGDStrategy
from lightning_easgd.checkpoint import WorkerCheckpoints
from lightning_easgd.checkpoint_io import AtomicCheckpointIO
from lightning_easgd.fingerprint import fingerprint
from lightning_easgd.workloads.loading import ResumableLoader

_FORK = multiprocessing.get_context("fork")
_SIGNALS = {signal.SIGKILL: 4, signal.SIGTERM: 3, signal.SIGINT: 3, signal.SIGSTOP: 1}
"""What strikes, and how often; who waits for one that is stopped takes seconds to be sure."""
_EPOCHS, _STEPS_PER_EPOCH = 6, 6
_CHECKPOINT_EVERY = 3
_FARTHEST = 9
"""Steps after the newest checkpoint within which a strike falls."""
_LONGEST_DELAY_SECONDS = 0.03
_LIMIT_SECONDS = 90.0
_POLL_SECONDS = 2e-4


class ChaosError(RuntimeError):
    """Workers did not end, or a checkpoint is not whole."""


class Workload(pl.LightningModule):
    """Regression with all that a checkpoint must not forget: momentum, statistics, chance."""

    def __init__(self, steps: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)
        )
        self.steps = steps

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of a batch."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """Nesterov momentum under a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_end(self, *_: Any) -> None:
        """Tell the others how far this worker is."""
        self.steps[self.global_rank] = self.global_step


def train(folder: Path, workers: int, steps: Any) -> tuple[int, str]:
    """What one worker does: train from the newest checkpoint; a digest of the center delivered."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    module = Workload(steps)
    saving = ModelCheckpoint(
        folder, "last", every_n_train_steps=_CHECKPOINT_EVERY, enable_version_counter=False
    )
    trainer = pl.Trainer(
        strategy=EASGDStrategy(
            tau=4, strict_resume=True, exchange_timeout=1, timeout=timedelta(seconds=10)
        ),
        accelerator="cpu",
        devices=workers,
        max_epochs=_EPOCHS,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(1 + trainer.global_rank)
    x = torch.randn(_STEPS_PER_EPOCH * 4, 8)
    loader = ResumableLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")
    return fingerprint(module.state_dict())


class Workers:
    """Forked workers of one start; leaving the ``with`` block kills those that still run."""

    def __init__(self, folder: Path, count: int) -> None:
        self.steps = _FORK.RawArray("q", count)
        self.delivered: list[Any] = [None] * count
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(count):
            receiver, sender = _FORK.Pipe(duplex=False)
            arguments = (folder, rank, count, port, self.steps, sender)
            process = _FORK.Process(target=_work, args=arguments, daemon=True)
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()

    def reach(self, rank: int, step: int) -> bool:
        """Wait until a worker has taken ``step`` steps; False if it ended before."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while self.steps[rank] < step:
            if not self._processes[rank].is_alive():
                return False
            if time.monotonic() > deadline:
                raise ChaosError(f"worker {rank} did not reach step {step}")
            time.sleep(_POLL_SECONDS)
        return True

    def strike(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a worker, if it still runs."""
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, number)

    def kill(self) -> None:
        """Kill all workers."""
        for process in self._processes:
            process.kill()

    def collect(self, *, stopped: int | None = None) -> None:
        """Wait for all workers to end; one that was stopped is killed when the others have ended.

        Raises:
            ChaosError: one did not end.
        """
        order = sorted(range(len(self._processes)), key=lambda rank: rank == stopped)
        deadline = time.monotonic() + _LIMIT_SECONDS
        for rank in order:
            if rank == stopped:
                self._processes[rank].kill()
            self._processes[rank].join(max(0.0, deadline - time.monotonic()))
            if self._processes[rank].is_alive():
                raise ChaosError(f"worker {rank} did not end within {_LIMIT_SECONDS:g} s")
            with contextlib.suppress(EOFError):  # it ended without a result
                self.delivered[rank] = self._pipes[rank].recv()


def _work(folder: Path, rank: int, count: int, port: str, steps: Any, sender: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(folder / f"worker{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        WORLD_SIZE=str(count),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
    )
    try:
        sender.send(train(folder, count, steps))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    # Not through interpreter shutdown: a failed worker may have collectives in flight.
    os._exit(0)


@dataclass(frozen=True)
class Strike:
    """What happens in one round."""

    worker: int
    number: signal.Signals
    step: int
    delay_seconds: float
    power_cut: bool
    """Whether the others are killed at the same moment, or left to notice."""

    @classmethod
    def draw(cls, chance: random.Random, workers: int, newest: int) -> Strike:
        """One at random, after the newest checkpoint's step."""
        (number,) = chance.choices([*_SIGNALS], [*_SIGNALS.values()])
        return cls(
            worker=chance.randrange(workers),
            number=number,
            step=newest + chance.randint(1, _FARTHEST),
            delay_seconds=chance.uniform(0, _LONGEST_DELAY_SECONDS),
            power_cut=number == signal.SIGKILL and chance.random() < 0.5,
        )

    def __str__(self) -> str:
        others = ", the others killed" if self.power_cut else ""
        name = self.number.name.removeprefix("SIG")
        delay = f"{1e3 * self.delay_seconds:.0f} ms"
        return f"{name:4} to worker {self.worker} at step {self.step} + {delay}{others}"

    def carry_out(self, group: Workers) -> bool:
        """Strike, and reap all workers; False if training ended before."""
        on_time = group.reach(self.worker, self.step)
        if on_time:
            time.sleep(self.delay_seconds)
            group.strike(self.worker, self.number)
            if self.power_cut:
                group.kill()
        stopped = self.worker if on_time and self.number == signal.SIGSTOP else None
        group.collect(stopped=stopped)
        return on_time


@dataclass
class Summary:
    """What all rounds together showed."""

    signals: Counter[str]
    lost: list[int]
    runs: int = 0
    equal: int = 0

    def __str__(self) -> str:
        signals = ", ".join(f"{count} {name}" for name, count in sorted(self.signals.items()))
        mean = sum(self.lost) / max(1, len(self.lost))
        return (
            f"{len(self.lost)} strike(s): {signals or 'none'}; steps lost by one: {mean:.1f} on"
            f" average, {max(self.lost, default=0)} at most. {self.equal} of {self.runs} run(s)"
            f" delivered the center of the undisturbed one, bit for bit."
        )


def run(
    rounds: int, *, seed: int, workers: int, folder: Path, say: Callable[[str], None] = print
) -> Summary:
    """Train undisturbed, then disturbed for ``rounds`` rounds and on to the end.

    Raises:
        ChaosError: workers did not end, or a checkpoint is not whole.
    """
    torch.set_num_threads(1)  # a fork does not survive OpenMP's threads
    chance = random.Random(seed)
    expected = _undisturbed(_new(folder / "undisturbed"), workers)
    summary = Summary(Counter(), [])
    while not summary.runs or len(summary.lost) < rounds:
        struck = _new(folder / f"struck{summary.runs}")
        delivered: list[Any] = [None]
        while None in delivered and len(summary.lost) < rounds:
            delivered = _round(chance, struck, workers, summary, say)
        if None in delivered:
            delivered = _undisturbed(struck, workers)
        summary.runs += 1
        summary.equal += delivered == expected
        verdict = "the same center" if delivered == expected else "ANOTHER CENTER"
        say(f"run {summary.runs} ended with {verdict}")
    return summary


def _round(
    chance: random.Random,
    folder: Path,
    workers: int,
    summary: Summary,
    say: Callable[[str], None],
) -> list[Any]:
    began, newest = time.monotonic(), require_whole(folder, workers)
    strike = Strike.draw(chance, workers, newest)
    with Workers(folder, workers) as group:
        on_time = strike.carry_out(group)
        reached = max(group.steps)
    if not on_time and None in group.delivered:
        raise ChaosError(f"a worker failed that was not struck; see {folder}/worker*.log")
    if on_time:
        newest = require_whole(folder, workers)
        lost = max(0, reached - newest)
        summary.signals[strike.number.name] += 1
        summary.lost.append(lost)
        seconds = time.monotonic() - began
        say(f"round {len(summary.lost)}: {strike}; {lost} step(s) lost, {seconds:.1f} s")
    return group.delivered


def _undisturbed(folder: Path, workers: int) -> list[Any]:
    with Workers(folder, workers) as group:
        group.collect()
    if None in group.delivered:
        raise ChaosError(f"a worker failed that was not struck; see {folder}/worker*.log")
    return group.delivered


def require_whole(folder: Path, workers: int) -> int:
    """The step of the newest checkpoint, 0 without any.

    Raises:
        ChaosError: a file has its final name and cannot be read, or a worker's part is missing.
    """
    try:
        for path in folder.rglob("*.ckpt"):
            torch.load(path, weights_only=True)
        newest = folder / "last.ckpt"
        if not newest.exists():
            return 0
        for rank in range(workers):
            main = torch.load(newest, weights_only=True)
            step = int(main["global_step"])
            saved = WorkerCheckpoints(
                AtomicCheckpointIO(), rank=rank, workers=workers, gather=lambda value: [value]
            )
            saved.resume(main, str(newest), weights_only=True, strict=True)
    except Exception as error:
        raise ChaosError(f"{folder} does not hold a whole checkpoint: {error}") from error
    return step


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if all runs delivered the same bits, 1 if not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="strikes (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the strikes (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to write; default: one that is removed")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        summary = run(given.rounds, seed=given.seed, workers=given.workers, folder=folder)
    except ChaosError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    print(summary)
    return 0 if summary.equal == summary.runs else 1


if __name__ == "__main__":
    sys.exit(main())
