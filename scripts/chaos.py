"""Strike a training run at random, again and again, and check that nothing is ever lost or changed.

Trains a small workload once undisturbed. Then trains it again, and in every round a random worker
gets a random signal at a random step, or a few milliseconds later, or while training is set up, so
that strikes fall into saves as well; all workers end, and the next round resumes from the newest
checkpoint. Every checkpoint file that has its final name must be whole, and the center delivered at
the end must have the bits of the undisturbed run. A run that ends before the rounds do is compared
and followed by another.

With --also, other things happen beside signals: a worker's loader is stuck (STUCK) or slow (SLOW),
the disk is full (FULL) or read-only (READ). For the last two root gives the folder a small disk.

python scripts/chaos.py --rounds 100 --seed 1 --also STUCK SLOW FULL READ

With --center workers train at their own pace, at a server. One fault happens in each run, --rounds
of each kind: a worker, the server or a primary is killed, a link is cut or a process stopped for
five seconds. No step of a survivor and no difference that was added may be lost. The results are in
faults.jsonl of --folder, and a later call goes on with what is left.

python scripts/chaos.py --center --rounds 20 --folder outputs/faults
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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import struck
import torch
from disk import SmallDisk
from faults import KINDS, require_hosts, run_all, table
from struck import Struck

from lightning_easgd.checkpoint.restoring import Restorer
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO

_SIGNALS = {"KILL": 4, "TERM": 3, "INT": 3, "STOP": 1}
"""What strikes, and how often; who waits for one that is stopped takes seconds to be sure."""
_OTHERS = ("STUCK", "SLOW", "FULL", "READ")
_STORAGE = ("FULL", "READ")
_STAY = ("STOP", "STUCK")
"""Upon these the worker that is struck does not end."""
_LONGEST_END_SECONDS = struck.EXCHANGE_TIMEOUT + 15
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
    kind: str
    step: int
    """After which it strikes, 0: of set-up."""
    delay_seconds: float
    power_cut: bool
    """Whether the others are killed at the same moment, or left to notice."""

    @classmethod
    def draw(
        cls, chance: random.Random, workers: int, newest: int, also: Sequence[str] = ()
    ) -> Strike:
        """One at random, after the newest checkpoint's step."""
        often = _SIGNALS | dict.fromkeys(also, 2)
        (kind,) = chance.choices([*often], [*often.values()])
        in_set_up = chance.random() < _SET_UP_SHARE and kind in _SIGNALS
        return cls(
            worker=chance.randrange(workers),
            kind=kind,
            step=0 if in_set_up else newest + chance.randint(1, _FARTHEST),
            delay_seconds=chance.uniform(
                0, _SET_UP_SECONDS if in_set_up else _LONGEST_DELAY_SECONDS
            ),
            power_cut=kind == "KILL" and chance.random() < 0.5,
        )

    def __str__(self) -> str:
        others = ", the others killed" if self.power_cut else ""
        delay = f"{1e3 * self.delay_seconds:.0f} ms"
        when = f"at step {self.step}" if self.step else "in set-up"
        return f"{self.kind:4} to worker {self.worker} {when} + {delay}{others}"

    def carry_out(self, group: Struck, disk: SmallDisk | None) -> bool:
        """Strike, and reap all workers; False if training ended before.

        Raises:
            ChaosError: they took too long to end.
        """
        on_time = group.reach(self.worker, self.step)
        began = time.monotonic()
        if on_time:
            time.sleep(self.delay_seconds)
            on_time = self._strike(group, disk)
            if on_time and self.power_cut:
                group.kill()
        group.reap(stopped=self.worker if on_time and self.kind in _STAY else None)
        took = time.monotonic() - began
        if self.step and self.kind != "SLOW" and took > _LONGEST_END_SECONDS:
            raise ChaosError(f"the workers took {took:.1f} s to end after {self}")
        return on_time

    def _strike(self, group: Struck, disk: SmallDisk | None) -> bool:
        if self.kind in _SIGNALS:
            return group.strike(self.worker, signal.Signals[f"SIG{self.kind}"])
        if disk is not None and self.kind in _STORAGE:
            disk.fill() if self.kind == "FULL" else disk.forbid()
        else:
            group.pauses[self.worker] = struck.FOR_EVER if self.kind == "STUCK" else struck.A_WHILE
        return group.runs(self.worker)


@dataclass
class Summary:
    """What all rounds together showed."""

    strikes: Counter[str]
    lost: list[int]
    runs: int = 0
    equal: int = 0

    def __str__(self) -> str:
        strikes = ", ".join(f"{count} {name}" for name, count in sorted(self.strikes.items()))
        mean = sum(self.lost) / max(1, len(self.lost))
        return (
            f"{len(self.lost)} strike(s): {strikes or 'none'}; steps lost by one: {mean:.1f} on"
            f" average, {max(self.lost, default=0)} at most. {self.equal} of {self.runs} run(s)"
            f" delivered the center of the undisturbed one, bit for bit."
        )


def run(
    rounds: int,
    *,
    seed: int,
    workers: int,
    folder: Path,
    also: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Summary:
    """Train undisturbed, then disturbed for ``rounds`` rounds and on to the end.

    Args:
        rounds: how many.
        seed: of the strikes.
        workers: how many.
        folder: where they write.
        also: what happens beside signals.
        say: where progress is told.

    Raises:
        ChaosError: a worker failed that was not struck, or a checkpoint is not whole.
        TimeoutError: workers did not end.
    """
    torch.set_num_threads(1)  # a fork does not survive OpenMP's threads
    chance = random.Random(seed)
    expected = _undisturbed(_new(folder / "undisturbed"), workers)
    summary = Summary(Counter(), [])
    while not summary.runs or len(summary.lost) < rounds:
        with ExitStack() as stack:
            here = _new(folder / f"struck{summary.runs}")
            disk = None
            if not {*_STORAGE}.isdisjoint(also):
                disk = stack.enter_context(SmallDisk(here))
            delivered: list[Any] = [None]
            while None in delivered and len(summary.lost) < rounds:
                delivered = _round(chance, here, workers, summary, say, also=also, disk=disk)
            if None in delivered:
                delivered = _undisturbed(here, workers)
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
    *,
    also: Sequence[str],
    disk: SmallDisk | None,
) -> list[Any]:
    began, newest = time.monotonic(), require_whole(folder, workers)
    strike = Strike.draw(chance, workers, newest, also)
    with Struck(folder, workers) as group:
        try:
            on_time = strike.carry_out(group, disk)
        finally:
            if disk is not None:
                disk.restore()
        reached = max(group.steps)
    if not on_time and None in group.delivered:
        raise ChaosError(f"a worker failed that was not struck; see {folder}.worker*.log")
    if on_time:
        newest = require_whole(folder, workers)
        lost = max(0, reached - newest)
        summary.strikes[strike.kind] += 1
        summary.lost.append(lost)
        seconds = time.monotonic() - began
        say(f"round {len(summary.lost)}: {strike}; {lost} step(s) lost, {seconds:.1f} s")
    return group.delivered


def _undisturbed(folder: Path, workers: int) -> list[Any]:
    with Struck(folder, workers) as group:
        group.reap()
    if None in group.delivered:
        raise ChaosError(f"a worker failed that was not struck; see {folder}.worker*.log")
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
            restorer = Restorer(storage, rank=rank, gather=lambda value: [value])
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
    parser.add_argument(
        "--rounds", type=int, default=20, help="strikes, or faults of each kind (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the strikes (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: 2, with --center 4)")
    parser.add_argument(
        "--also", nargs="+", choices=_OTHERS, default=[], help="what happens beside signals"
    )
    parser.add_argument("--folder", type=Path, help="where to write; default: one that is removed")
    parser.add_argument("--center", action="store_true", help="workers at a server")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults, with --center"
    )
    given = parser.parse_args(arguments)
    if given.center and given.also:
        parser.error("--also is for workers that exchange together: leave out --center or --also")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        if given.center:
            return _strike_apart(given, folder)
        summary = run(
            given.rounds,
            seed=given.seed,
            workers=given.workers or 2,
            folder=folder,
            also=given.also,
        )
    except (ChaosError, TimeoutError, ValueError) as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    print(summary)
    return 0 if summary.equal == summary.runs else 1


def _strike_apart(given: argparse.Namespace, folder: Path) -> int:
    """Exit code 0 if nothing was lost."""
    require_hosts(given.kinds)
    workers = given.workers or 4
    results = run_all(given.kinds, given.rounds, seed=given.seed, workers=workers, folder=folder)
    print(f"\n{table(results)}")
    return 1 if any(found.error for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
