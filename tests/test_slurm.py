"""SLURM's signal to save and to requeue reaches all workers at the same step."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import become_slurm_task, free_port, run_workers
from toy import Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy

STEPS = 18

SCONTROL = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/called"
"""


def preempted(rank: int, port: int, who: int, folder: Path, ckpt_path: str | None) -> Any:
    """Train as SLURM's tasks do; worker ``who`` gets the signal in its batch 5."""
    become_slurm_task(rank, port)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    module = Toy(partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True))

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == who and batch_idx == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    module.on_train_batch_start = on_train_batch_start
    environment = SLURMEnvironment(requeue_signal=signal.SIGUSR1)
    options = {"default_root_dir": folder, "plugins": [environment], "max_epochs": 2}
    fitting = trainer(2, EASGDStrategy(tau=4), **options)
    error = None
    try:
        fitting.fit(module, Resumable(rank, STEPS), ckpt_path=ckpt_path)
    except BaseException as raised:
        error = type(raised).__name__
    return error, fitting.global_step, weights(module)["w"].tobytes()


@pytest.mark.parametrize("who", [0, 1])
def test_slurms_signal_saves_once_requeues_and_resumes_bit_for_bit(
    who: int, tmp_path: Path
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    ended = run_workers(preempted, free_port(), who, tmp_path, None, workers=2, timeout=30)
    assert [outcome[:2] for outcome in ended] == [("SIGTERMException", 13)] * 2
    assert (tmp_path / "called").read_text() == "requeue 7\n"
    resumed = run_workers(preempted, free_port(), -1, tmp_path, "hpc", workers=2, timeout=30)
    straight = run_workers(preempted, free_port(), -1, tmp_path, None, workers=2, timeout=30)
    assert resumed == straight
