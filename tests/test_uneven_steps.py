"""Workers with as many batches that take different numbers of optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import reference_optimizers
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from staying import run_workers
from torch.utils.data import BatchSampler, DataLoader, Dataset
from toy import Batches, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import Phase
from lightning_easgd.exchange.exchange import Exchange

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
]
LR, BATCHES, TAU = 0.1, 20, 4
SGD = partial(torch.optim.SGD, lr=LR)
SKIPPED = [3, 7, 8, 11, 19]
"""Batches of worker 1 that have no step."""
SHORT = [number for number in range(BATCHES) if number > 14]
"""Those that it does not begin, where an epoch can only end early."""


class Skipping(Toy):
    """Worker 1 takes no step for some batches; validation reduces over the workers."""

    skips = True

    def __init__(self) -> None:
        super().__init__(SGD)
        self.steps = 0
        self.places: list[str] = []

    def skipped(self, batch_idx: int) -> bool:
        return self.skips and self.global_rank == 1 and batch_idx in SKIPPED

    def loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch, batch_idx), sync_dist=True)


class Manual(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        if not self.skipped(batch_idx):
            optimizer.step()


class LoggedAtEveryStep(Manual):
    """Workers meet at the end of every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("norm", self.w.norm(), on_step=True, on_epoch=True, sync_dist=True)


class OwnStep(Skipping):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.skipped(batch_idx):
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class NoBatch(Skipping):
    """Lightning leaves out what is None after the transfer."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        number = self.trainer.fit_loop.batch_idx + 1
        training = self.trainer.training
        return None if training and self.skipped(number) else batch


class EndsEpoch(Skipping):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.global_rank == 1 and batch_idx == SHORT[0] else None


class DrawsItself(Skipping):
    """Worker 1 throws batches away."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:
        batch, number, _ = next(dataloader_iter)
        while self.global_rank == 1 and number in SKIPPED[:-1]:
            batch, number, _ = next(dataloader_iter)
        return self.loss(batch, number)


class Holes(Dataset):
    """Batches, of which worker 1 has some missing."""

    def __init__(self, rank: int) -> None:
        self.batches = Batches(rank, BATCHES)
        self.missing = SKIPPED if rank == 1 else []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        return None if number in self.missing else self.batches[number]


class Promises(BatchSampler):
    """Has fewer batches than it says."""

    def __init__(self, rank: int) -> None:
        super().__init__(range(BATCHES), 1, False)
        self.count = SHORT[0] if rank == 1 else BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        return ([number] for number in range(self.count))


def first(items: list[Any]) -> Any:
    return items[0]


WAYS: dict[str, tuple[type[Skipping], Callable[[int], Any] | None, list[int]]] = {
    "manual optimization": (Manual, None, SKIPPED),
    "metrics at every step": (LoggedAtEveryStep, None, SKIPPED),
    "overridden optimizer_step": (OwnStep, None, SKIPPED),
    "no batch after the transfer": (NoBatch, None, SKIPPED),
    "an epoch that ends early": (EndsEpoch, None, SHORT),
    "batches thrown away": (DrawsItself, None, SKIPPED[:-1]),
    "no batch": (
        Skipping,
        lambda rank: DataLoader(Holes(rank), batch_size=1, collate_fn=first),
        SKIPPED,
    ),
    "a sampler that is too short": (
        Skipping,
        lambda rank: DataLoader(Batches(rank, BATCHES), batch_sampler=Promises(rank)),
        SHORT,
    ),
}


def expected(skipped: list[int], epochs: int, meetings: list[int]) -> reference.State:
    """Worker 1 is idle at each meeting for as many steps as it skipped since the last."""
    mine = []
    for number, batch in enumerate(batches(1, BATCHES)):
        mine += [] if number in skipped else [batch]
        if number + 1 in meetings:
            mine += (number + 1 - len(mine)) * [None]
    center, _ = reference.easgd(
        initial_weights(),
        [epochs * batches(0, BATCHES), epochs * mine],
        reference_optimizers("sgd", lambda name, t: LR, 2),
        tau=TAU,
        alpha=lambda name, t: 0.45,
        final_exchange=True,
    )
    return center


def fit(rank: int, way: str, options: dict[str, Any], settings: dict[str, Any]) -> Any:
    make, make_loader, _ = WAYS[way]
    module, places = make(), []
    meet = Exchange.meet
    fitting = trainer(2, EASGDStrategy(tau=TAU, **options), num_sanity_val_steps=0, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "meet", lambda self, at: [places.append(at), meet(self, at)][1])
        train = make_loader(rank) if make_loader else loader(rank, BATCHES)
        fitting.fit(module, train, loader(0, 2))
    return weights(module), fitting.callback_metrics.get("loss", torch.zeros(())).item(), places


EARLY = ["an epoch that ends early", "a sampler that is too short"]
"""Ways by which an epoch ends before Lightning would validate."""


@pytest.mark.parametrize(
    ("way", "overlap"),
    [*((way, True) for way in WAYS), ("manual optimization", False), ("no batch", False)],
)
def test_who_takes_fewer_steps_answers_at_validations_and_epoch_ends(
    way: str, overlap: bool
) -> None:
    settings = {"max_epochs": 2, "limit_val_batches": 0 if way in EARLY else 2}
    results = run_workers(fit, way, {"overlap": overlap}, settings, workers=2, timeout=40)
    meetings = [BATCHES]
    if way == "metrics at every step":
        meetings = list(range(1, BATCHES + 1))
    center = expected(WAYS[way][2], 2, meetings)
    for got, _, places in results:
        assert places.count(Phase.EPOCH_END) == 2
        assert places.count(Phase.VALIDATION) == (0 if way in EARLY else 2)
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("way", EARLY)
def test_a_validation_that_one_worker_ends_its_epoch_before_is_an_error_on_all(way: str) -> None:
    outcomes = run_workers(fit, way, {}, {}, workers=2, timeout=40, check=False)
    assert [outcome.error for outcome in outcomes] == ["ExchangeError"] * 2
    for outcome in outcomes:
        assert "(worker 0: validation; worker 1: epoch end)" in outcome.message


@pytest.mark.parametrize("way", ["manual optimization", "overridden optimizer_step"])
def test_a_validation_within_the_epoch_makes_clocks_equal(way: str) -> None:
    settings = {"val_check_interval": 10}
    results = run_workers(fit, way, {}, settings, workers=2, timeout=40)
    center = expected(SKIPPED, 1, [10, 20])
    for got, *_ in results:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["local_sgd", "diloco", "sma", "leader_sgd", "delayed_sgd"])
def test_under_every_kind_of_rule(algorithm: str) -> None:
    results = run_workers(fit_returning, algorithm, workers=2, timeout=40)
    assert results[0] == results[1]


class Returning(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        return self.loss(batch, batch_idx).detach()


def fit_returning(rank: int, algorithm: str) -> Any:
    module = Returning()
    strategy = EASGDStrategy(algorithm=algorithm, tau=TAU)
    trainer(2, strategy, max_epochs=2).fit(module, loader(rank, BATCHES), loader(0, 2))
    return {name: value.tobytes() for name, value in weights(module).items()}


def plain(rank: int, stopping: bool) -> Any:
    """Where all workers take the same steps there is nothing to meet for."""
    module, places = Skipping(), []
    module.skips = False
    meet = Exchange.meet
    callbacks = [EarlyStopping("loss", patience=9)] if stopping else []
    fitting = trainer(2, EASGDStrategy(tau=TAU), max_epochs=2, callbacks=callbacks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "meet", lambda self, at: [places.append(at), meet(self, at)][1])
        fitting.fit(module, loader(rank, BATCHES), loader(0, 2))
    return places


@pytest.mark.parametrize("stopping", [False, True])
def test_workers_that_cannot_differ_meet_at_the_end_only(stopping: bool) -> None:
    assert run_workers(plain, stopping, workers=2) == [[Phase.FIT_END]] * 2


def saving(rank: int, folder: Path, every: int, skipped: list[int], by_hand: bool) -> Any:
    module = Manual()
    module.skipped = lambda batch_idx: rank == 1 and batch_idx in skipped
    callbacks: list[Any] = [ModelCheckpoint(folder, "{step}", every_n_train_steps=every)]
    if by_hand:
        callbacks = []

        def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % every == every - 1:
                fitting.save_checkpoint(folder / "by hand.ckpt")

        module.on_train_batch_end = on_train_batch_end
    options = {"callbacks": callbacks, "enable_checkpointing": not by_hand}
    fitting = trainer(2, EASGDStrategy(tau=TAU, overlap=not by_hand), **options)
    fitting.fit(module, loader(rank, BATCHES))
    return weights(module), fitting.global_step


def test_who_saves_at_a_step_waits_there_for_all_others(tmp_path: Path) -> None:
    results = run_workers(saving, tmp_path, 8, [3], False, workers=2, timeout=40)
    assert [steps for _, steps in results] == [20, 19]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=16.ckpt"]
    for got, _ in results:
        np.testing.assert_allclose(got["w"], expected([3], 1, [BATCHES])["w"], rtol=1e-9)


def test_a_save_at_the_same_batch_makes_clocks_equal(tmp_path: Path) -> None:
    results = run_workers(saving, tmp_path, 5, SKIPPED, True, workers=2, timeout=40)
    for got, _ in results:
        center = expected(SKIPPED, 1, [5, 10, 15, 20])
        np.testing.assert_allclose(got["w"], center["w"], rtol=1e-9)


def test_a_save_that_another_worker_does_not_reach_is_an_error_on_all(tmp_path: Path) -> None:
    arguments = tmp_path, 8, SKIPPED, False
    outcomes = run_workers(saving, *arguments, workers=2, timeout=40, check=False)
    assert [outcome.error for outcome in outcomes] == ["ExchangeError"] * 2
    for outcome in outcomes:
        assert "(worker 0: collective; worker 1: epoch end)" in outcome.message
        assert "They have taken [16, 15] steps" in outcome.message


def in_a_group(rank: int) -> None:
    strategy = EASGDStrategy(tau=TAU, groups=[[0, 1]])
    trainer(2, strategy).fit(Manual(), loader(rank, BATCHES))


def test_workers_of_a_group_take_the_same_steps_or_all_are_told() -> None:
    outcomes = run_workers(in_a_group, workers=2, timeout=40, check=False)
    assert [outcome.error for outcome in outcomes] == ["ExchangeError"] * 2
    assert "worker 0: gradients at step 4; worker 1: gradients at step 3" in outcomes[0].message
