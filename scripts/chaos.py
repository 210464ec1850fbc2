"""Strike a training run at random, again and again, and check that nothing is ever lost or changed.

Trains a small workload once undisturbed. Then trains it again, and in every round a random worker
gets a random signal at a random step, or a few milliseconds later, or while training is set up, so
that strikes fall into saves as well; all workers end, and the next round resumes from the newest
checkpoint. Every checkpoint file that has its final name must be whole, and the center delivered at
the end must have the bits of the undisturbed run. A run that ends before the rounds do is compared
and followed by another.

python scripts/chaos.py --rounds 100 --seed 1
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from struck import Struck

from lightning_easgd.checkpoint_io import AtomicCheckpointIO
from lightning_easgd.restoring import Restorer

_SIGNALS = {signal.SIGKILL: 4, signal.SIGTERM: 3, signal.SIGINT: 3, signal.SIGSTOP: 1}
"""What strikes, and how often; who waits for one that is stopped takes seconds to be sure."""
_FARTHEST = 9
"""Steps after the newest checkpoint within which a strike falls."""
_LONGEST_DELAY_SECONDS = 0.03
_SET_UP_SHARE, _SET_UP_SECONDS = 0.2, 0.5
"""How many strikes fall into set-up, and how long it takes, with some steps after it."""


class ChaosError(RuntimeError):
    """A worker failed that was not struck, or a checkpoint is not whole."""


@dataclass(frozen=True)
class Strike:
    """What happens in one round."""

    worker: int
    number: signal.Signals
    step: int
    """After which it strikes, 0: of set-up."""
    delay_seconds: float
    power_cut: bool
    """Whether the others are killed at the same moment, or left to notice."""

    @classmethod
    def draw(cls, chance: random.Random, workers: int, newest: int) -> Strike:
        """One at random, after the newest checkpoint's step."""
        (number,) = chance.choices([*_SIGNALS], [*_SIGNALS.values()])
        in_set_up = chance.random() < _SET_UP_SHARE
        return cls(
            worker=chance.randrange(workers),
            number=number,
            step=0 if in_set_up else newest + chance.randint(1, _FARTHEST),
            delay_seconds=chance.uniform(
                0, _SET_UP_SECONDS if in_set_up else _LONGEST_DELAY_SECONDS
            ),
            power_cut=number == signal.SIGKILL and chance.random() < 0.5,
        )

    def __str__(self) -> str:
        others = ", the others killed" if self.power_cut else ""
        name = self.number.name.removeprefix("SIG")
        delay = f"{1e3 * self.delay_seconds:.0f} ms"
        when = f"at step {self.step}" if self.step else "in set-up"
        return f"{name:4} to worker {self.worker} {when} + {delay}{others}"

    def carry_out(self, group: Struck) -> bool:
        """Strike, and reap all workers; False if training ended before."""
        on_time = group.reach(self.worker, self.step)
        if on_time:
            time.sleep(self.delay_seconds)
            on_time = group.strike(self.worker, self.number)
            if on_time and self.power_cut:
                group.kill()
        stopped = self.worker if on_time and self.number == signal.SIGSTOP else None
        group.reap(stopped=stopped)
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
        ChaosError: a worker failed that was not struck, or a checkpoint is not whole.
        TimeoutError: workers did not end.
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
    with Struck(folder, workers) as group:
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
    with Struck(folder, workers) as group:
        group.reap()
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
        storage = AtomicCheckpointIO()
        for rank in range(workers):
            restorer = Restorer(storage, rank=rank, workers=workers, gather=lambda value: [value])
            read = partial(storage.load_checkpoint, newest)
            found = restorer.read(str(newest), read, weights_only=True)
            if restorer.resume(found, strict=True) is None:
                raise ChaosError(f"{newest} holds no states of workers")
            step = int(found.checkpoint["global_step"])
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
    except (ChaosError, TimeoutError) as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    print(summary)
    return 0 if summary.equal == summary.runs else 1


if __name__ == "__main__":
    sys.exit(main())
