"""Plugins that queue writes: nothing takes a write that returned for one that happened."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from saving import train
from staying import run_workers

from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.. is set, but there is no last"),
]


class Slow(AtomicCheckpointIO):
    """Takes its time on one worker; a plugin's queue grows meanwhile."""

    def __init__(self, who: int, seconds: float) -> None:
        self.who, self.seconds = who, seconds

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if os.environ["RANK"] == str(self.who):
            time.sleep(self.seconds)
        super().save_checkpoint(checkpoint, path, storage_options)


SAVING = {
    "replaced": {"name": "last"},
    "top 1": {"name": "{step}", "monitor": "step", "mode": "max", "save_top_k": 1},
    "top 2": {"name": "{step}", "monitor": "step", "mode": "max", "save_top_k": 2},
    "both": {
        "name": "{step}",
        "monitor": "step",
        "mode": "max",
        "save_top_k": 1,
        "save_last": True,
    },
}


def queued(rank: int, folder: Path, who: int, saving: dict[str, Any]) -> Any:
    storage = AsyncCheckpointIO(Slow(who, 0.05))
    saving = {"every_n_train_steps": 1, **saving}
    ended = train(rank, folder, storage=storage, ckpt_path=None, **saving)
    found = sorted(str(path.name) for path in folder.glob("*.ckpt"))
    return ended, found


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("saving", SAVING.values(), ids=SAVING)
def test_what_is_removed_or_replaced_waits_for_the_writes_that_are_queued(
    saving: dict[str, Any], who: int, tmp_path: Path
) -> None:
    (_, one), (_, two) = run_workers(queued, tmp_path, who, saving, workers=2)
    last = {"last.ckpt"} if saving["name"] == "last" or "save_last" in saving else set()
    newest = {f"step={step}.ckpt" for step in range(13 - saving.get("save_top_k", 1), 13)}
    expected = last | (newest if "monitor" in saving else set())
    assert set(one) == set(two) == expected
    for name in expected:
        content = torch.load(tmp_path / name, weights_only=True)
        save = content["lightning_easgd"]["save"]
        parts = {path.name for path in (tmp_path / f"{name}.workers").iterdir()}
        assert parts == {f"{save}-0.ckpt", f"{save}-1.ckpt"}
        path = str(tmp_path / name)
        resume = partial(train, ckpt_path=path, epochs=3)
        run_workers(resume, tmp_path / "resumed" / name, workers=2)


def fit_twice(rank: int, folder: Path) -> Any:
    """Begins a second fit from files whose writing one worker takes time for."""
    storage = AsyncCheckpointIO(Slow(0, 0.1))
    train(rank, folder, epochs=1, storage=storage, ckpt_path=None)
    return train(rank, folder, epochs=2, storage=storage)


def test_who_ends_a_fit_waits_until_all_is_written(tmp_path: Path) -> None:
    resumed = run_workers(fit_twice, tmp_path, workers=2)
    assert resumed == run_workers(train, tmp_path / "whole", workers=2)


class Broken(AtomicCheckpointIO):
    def __init__(self, who: int) -> None:
        self.who = who

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if os.environ["RANK"] == str(self.who):
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def broken(rank: int, folder: Path, who: int) -> None:
    train(rank, folder, storage=AsyncCheckpointIO(Broken(who)), ckpt_path=None)


@pytest.mark.parametrize("who", [0, 1])
def test_a_queued_write_that_fails_ends_all_and_leaves_no_main_file(
    who: int, tmp_path: Path
) -> None:
    outcomes = run_workers(broken, tmp_path, who, workers=2, check=False, timeout=40)
    assert outcomes[who].error == "OSError"
    assert outcomes[1 - who].error in ("CheckpointError", "ExchangeError")
    for outcome in outcomes:
        assert "No space left on device" in outcome.message
    assert not (tmp_path / "last.ckpt").exists()
