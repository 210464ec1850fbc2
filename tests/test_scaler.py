"""16-mixed with torch's gradient scaler, which works on the CPU too when it is given by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import LR, reference_optimizers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from staying import run_workers
from toy import Resumable, Toy, batches, initial_weights, trainer, weights

from lightning_easgd import EASGDStrategy

COUNT, OVERFLOWS = 12, 5


class Overflowing(Toy):
    """Worker 1's loss is too large for float16 gradients in batch 5 of its first epoch."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=LR), dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(tuple(part.float() for part in batch), batch_idx)
        first = self.trainer.current_epoch == 0
        return loss * 1e38 if first and self.global_rank == 1 and batch_idx == OVERFLOWS else loss


def fit(rank: int, epochs: int, folder: Path, resume: Path | None) -> Any:
    module = Overflowing()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    fitting = trainer(
        2,
        EASGDStrategy(tau=4, final_exchange=False),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        max_epochs=epochs,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )
    fitting.fit(module, Resumable(rank, COUNT), ckpt_path=resume)
    return weights(module), scaler.get_scale(), fitting.global_step


def test_a_step_that_one_worker_skips_is_a_step_of_the_clock(tmp_path: Path) -> None:
    results = run_workers(fit, 1, tmp_path, None, workers=2)
    skipped = batches(1, COUNT)
    skipped[OVERFLOWS] = None
    center, _ = reference.easgd(
        initial_weights(),
        [batches(0, COUNT), skipped],
        reference_optimizers("sgd", lambda name, t: LR, 2),
        tau=4,
        alpha=lambda name, t: 0.45,
    )
    for got, _, _ in results:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], atol=5e-3)
    # Two doublings after 5 good steps each; worker 1 halves its scale and starts counting again.
    assert [scale for _, scale, _ in results] == [2.0**12, 2.0**11]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_every_worker_resumes_with_its_own_scale(tmp_path: Path) -> None:
    straight = run_workers(fit, 2, tmp_path, None, workers=2)
    resumed = run_workers(fit, 2, tmp_path, tmp_path / "epoch=0.ckpt", workers=2)
    for got, expected in zip(resumed, straight, strict=True):
        assert got[1:] == expected[1:]
        assert all(np.array_equal(got[0][key], expected[0][key]) for key in expected[0])
