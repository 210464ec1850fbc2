"""Gradients averaged over workers, inside groups and in a warm-up: beside DDP and references."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import reference_optimizers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from modules import ADAMW, Gan
from staying import run_workers
from torch.optim import lr_scheduler
from toy import Resumable, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy, PostLocalSGD


class Partial(Toy):
    """Each worker uses a parameter of its own besides the others, and nobody the last one."""

    def __init__(self, rank: int) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1))
        self.own = torch.nn.ParameterList(torch.ones(2, dtype=torch.float64) for _ in range(4))
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + (self.own[self.rank] ** 2).sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Half(Toy):
    """Worker 1's loss is too large for float16 gradients in batch 5."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1), dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(tuple(part.float() for part in batch), batch_idx)
        return loss * 1e38 if self.global_rank == 1 and batch_idx == 5 else loss


class Scheduled(Toy):
    """With a schedule per step, and a loss that is clipped by value."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Complex(Toy):
    """With a complex parameter."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        self.z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, _ = batch
        return super().training_step(batch, batch_idx) + (self.z * x.mean() - 1j).abs().sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


MAKERS: dict[str, Any] = {
    "unused parameters": Partial,
    "manual optimization": lambda rank: Gan(),
    "float16": lambda rank: Half(),
    "accumulated and clipped": lambda rank: Scheduled(ADAMW),
    "bfloat16": lambda rank: Toy(ADAMW, dtype=torch.bfloat16),
    "complex": lambda rank: Complex(),
}


def last_weights(rank: int, name: str, strategy: Any) -> Any:
    """The worker's weights after its last step, and the scale of its gradients."""
    module, own = MAKERS[name](rank), {}
    module.on_train_epoch_end = lambda: own.update(
        {n: p.detach().to(torch.complex128).clone().numpy() for n, p in module.named_parameters()}
    )
    options: dict[str, Any] = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    if name == "float16":
        options |= {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        options |= {"gradient_clip_val": 0.5}
    if name == "accumulated and clipped":
        options |= {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float64
    trainer(3, strategy, **options).fit(module, loader(rank, 11, dtype))
    return own, scaler.get_scale()


def beside_ddp(rank: int) -> Any:
    return {
        name: [
            last_weights(rank, name, strategy)
            for strategy in (EASGDStrategy(groups=3, tau=4, alpha=0.0), FIND)
        ]
        for name in MAKERS
    }


FIND = "ddp_find_unused_parameters_true"


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_inside_a_group_training_is_that_of_ddp() -> None:
    """Unused parameters, manual optimization, clipping, precisions: a group without a pull."""
    for run in run_workers(beside_ddp, workers=3, timeout=120):
        for name, ((ours, scale), (theirs, their_scale)) in run.items():
            assert scale == their_scale
            tolerance = {"float16": 1e-3, "bfloat16": 0.05}.get(name, 1e-9)
            for key, value in ours.items():
                np.testing.assert_allclose(value, theirs[key], atol=tolerance, err_msg=name)


def scheduled(rank: int) -> Any:
    """Two epochs in which worker 1 has fewer batches than its mate; what both are then."""
    module = Scheduled(ADAMW)
    seen = []

    def on_train_epoch_start() -> None:
        state = fitting.optimizers[0].state_dict()
        moments = [s["exp_avg"].tolist() for s in state["state"].values()]
        values = {name: value.tobytes() for name, value in weights(module).items()}
        seen.append((values, moments, state["param_groups"][0]["lr"]))

    module.on_train_epoch_start = on_train_epoch_start
    fitting = trainer(2, EASGDStrategy(tau=4, groups=2), max_epochs=3)
    fitting.fit(module, loader(rank, [10, 7][rank]))
    return seen


def test_who_had_fewer_batches_goes_on_with_all_that_its_group_became() -> None:
    one, two = run_workers(scheduled, workers=2)
    assert one == two
    assert one[1][2] == pytest.approx(0.05 * 0.9**10)


def warmed_up(rank: int) -> Any:
    module = Toy(ADAMW)
    strategy = EASGDStrategy(algorithm=PostLocalSGD(warm_up=20), tau=4)
    trainer(2, strategy).fit(module, loader(rank, [10, 7][rank]))
    return weights(module)


def test_a_warm_up_lasts_with_fewer_batches_too() -> None:
    """All workers are one, as long as any of them has batches."""
    (data,) = reference.merged([batches(0, 10), batches(1, 7)], [[0, 1]])
    (optimizer,) = reference_optimizers("adamw", lambda name, t: 0.05, 1)
    x = initial_weights()
    for t, batch in enumerate(data):
        x = optimizer.step(x, reference.toy_gradient(x, batch), t)
    for got in run_workers(warmed_up, workers=2):
        for key, value in got.items():
            np.testing.assert_allclose(value, x[key], rtol=1e-9, atol=1e-11)


def parted(rank: int) -> Any:
    """Workers part at step 6, between two exchanges; worker 1 is idle since step 5."""
    module = Toy(partial(torch.optim.SGD, lr=0.05))
    strategy = EASGDStrategy(algorithm=PostLocalSGD(warm_up=6), tau=4)
    trainer(3, strategy).fit(module, loader(rank, [11, 5, 10][rank]))
    return weights(module)


def test_an_idle_worker_when_a_warm_up_ends_parts_where_the_others_do() -> None:
    data = [batches(rank, count) for rank, count in enumerate([11, 5, 10])]
    optimizers = reference_optimizers("sgd", lambda name, t: 0.05, 3)
    rule = reference.PostLocalSgd(6)
    center = reference.restarting(rule, initial_weights(), data, optimizers, tau=4)
    for got in run_workers(parted, workers=3):
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


def more_workers(rank: int, folder: Path, workers: int) -> Any:
    """Weights in a warm-up, two steps after a checkpoint that lies between two exchanges."""
    module, own = Toy(ADAMW), {}
    module.on_train_epoch_end = lambda: own.update(weights(module))
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    saved = folder / "step=5.ckpt"
    strategy = EASGDStrategy(algorithm=PostLocalSGD(warm_up=20), tau=4)
    trainer(workers, strategy, enable_checkpointing=True, callbacks=[saving]).fit(
        module, Resumable(rank, 7), ckpt_path=saved if workers == 3 else None
    )
    return own


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_workers_that_join_in_a_warm_up_begin_where_the_others_are(tmp_path: Path) -> None:
    run_workers(more_workers, tmp_path, 2, workers=2)
    data = [batches(rank, 7) for rank in range(3)]
    merged = reference.merged([data[0][:5], data[1][:5]], [[0, 1]])[0]
    merged += reference.merged([own[5:] for own in data], [[0, 1, 2]])[0]
    (optimizer,) = reference_optimizers("adamw", lambda name, t: 0.05, 1)
    x = initial_weights()
    for t, batch in enumerate(merged):
        x = optimizer.step(x, reference.toy_gradient(x, batch), t)
    for own in run_workers(more_workers, tmp_path, 3, workers=3):
        for key, value in own.items():
            np.testing.assert_allclose(value, x[key], rtol=1e-9, atol=1e-11)
