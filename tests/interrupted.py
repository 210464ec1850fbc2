"""Training that a signal to one worker stops, and that then goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_workers
from test_gradients import ADAMW
from toy import Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy


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
    resumed = run_workers(_fit, folder, options, counts, None, True, workers=workers)
    folder = folder / "straight"
    straight = run_workers(_fit, folder, options, counts, None, False, workers=workers)
    assert [error for (error, _), _ in resumed + straight] == [None] * 2 * workers
    assert [own for _, own in resumed] == [own for _, own in straight]
    return taken, [own for _, own in stopped]


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
    module.on_train_start = lambda: pids.extend(strategy._group.gather(os.getpid()))
    saving = ModelCheckpoint(folder, every_n_epochs=100, save_on_exception=True)
    more = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(len(counts), strategy, **more)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if who is not None and rank == 0 and (fitting.current_epoch, batch_idx) == (0, 8):
            os.kill(pids[who], signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    path = next(folder.glob("*.ckpt")) if resumes else None
    end = ended(fitting, module, Resumable(rank, counts[rank]), ckpt_path=path)
    return end, {name: value.tobytes() for name, value in weights(module).items()}
