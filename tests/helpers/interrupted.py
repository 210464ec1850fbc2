"""Training that one worker interrupts: by a signal, alone, or by its death."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ADAMW
from processes import Workers, run_workers
from staying import run_in_turn
from toy import Resumable, Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import heartbeat, store_thread

SGD = partial(torch.optim.SGD, lr=0.1)


def ended(fitting: pl.Trainer, *arguments: Any, **options: Any) -> tuple[str | None, int]:
    """How a fit ended, and after how many steps of this worker."""
    try:
        fitting.fit(*arguments, **options)
    except BaseException as error:
        return type(error).__name__, fitting.global_step
    return None, fitting.global_step


def stop_and_go_on(
    folder: Path, options: dict[str, Any], counts: list[int], who: int
) -> tuple[int, list[dict[str, bytes]]]:
    """SIGTERM to a worker, before batch 8 of the first of two epochs of so many batches each.

    All stop at the same step, and go on with the bits of a run that was not stopped.

    Returns:
        Steps at which they stopped, and every worker's weights there.
    """
    workers = len(counts)
    stopped = run_workers(_fit, folder, options, counts, who, False, workers=workers)
    assert {error for (error, _), _ in stopped} == {"SIGTERMException"}
    taken = max(steps for (_, steps), _ in stopped)
    assert [steps for (_, steps), _ in stopped] == [min(taken, count) for count in counts]
    cases = [(folder, options, counts, None, True), (folder / "s", options, counts, None, False)]
    resumed, straight = run_in_turn(_fit, cases, workers=workers)
    assert [error for (error, _), _ in resumed + straight] == [None] * 2 * workers
    assert [own for _, own in resumed] == [own for _, own in straight]
    return taken, [own for _, own in stopped]


def stop_alone(options: dict[str, Any]) -> list[int]:
    """Of 4 workers, worker 1 alone says after 6 steps that it is enough; all have one center then.

    Returns:
        Steps that each worker took.
    """
    results = run_workers(_enough, options, workers=4)
    assert all(center == results[0][1] for _, center in results)
    return [steps for steps, _ in results]


def signs_of_life_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds on a real network takes about a second here, in forked workers."""
    monkeypatch.setattr(heartbeat, "_PERIOD_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "_PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "_ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(store_thread, "_ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(store_thread, "_SILENCE_SECONDS", 1.5)


def kill_one(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], counts: list[int], who: int, at: int
) -> None:
    """SIGKILL to a worker before its batch ``at``, of so many batches each: all others name it."""
    signs_of_life_come_often(monkeypatch)
    options = {**options, "exchange_timeout": 5}
    with Workers(_killed, options, counts, who, at, workers=len(counts)) as group:
        outcomes = group.collect(60, without=who)
    for outcome in outcomes:
        assert outcome.error == "ExchangeError", outcome
        assert f"Worker {who} gave no sign of life" in outcome.message


def _enough(rank: int, options: dict[str, Any]) -> Any:
    module = Toy(SGD)

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 5:
            module.trainer.should_stop = True

    module.on_train_batch_end = on_train_batch_end
    fitting = trainer(4, EASGDStrategy(**options), max_epochs=3)
    fitting.fit(module, loader(rank, 30))
    return fitting.global_step, bits(weights(module))


def _killed(rank: int, options: dict[str, Any], counts: list[int], who: int, at: int) -> None:
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == who and batch_idx == at:
            os.kill(os.getpid(), signal.SIGKILL)

    module.on_train_batch_start = on_train_batch_start
    trainer(len(counts), EASGDStrategy(**options)).fit(module, loader(rank, counts[rank]))


def _fit(
    rank: int,
    folder: Path,
    options: dict[str, Any],
    counts: list[int],
    who: int | None,
    resumes: bool,
) -> Any:
    module, strategy = Toy(ADAMW), EASGDStrategy(**options)
    pids: list[int] = []
    module.on_train_start = lambda: pids.extend(strategy._fit.group.gather(os.getpid()))
    saving = ModelCheckpoint(folder, every_n_epochs=100, save_on_exception=True)
    more = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(len(counts), strategy, **more)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if who is not None and rank == 0 and (fitting.current_epoch, batch_idx) == (0, 8):
            os.kill(pids[who], signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    path = next(folder.glob("*.ckpt")) if resumes else None
    end = ended(fitting, module, Resumable(rank, counts[rank]), ckpt_path=path)
    return end, bits(weights(module))
