"""Stops while some workers train and others, which have no batch left, are idle."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import ended
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from staying import run_workers
from toy import Resumable, Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import Phase
from lightning_easgd.exchange.exchange import Exchange

SGD = partial(torch.optim.SGD, lr=0.1)


def struck(rank: int, counts: list[int], who: int, at: int, options: dict[str, Any]) -> Any:
    """When worker 1 begins its batch number ``at`` of all, SIGTERM is sent to worker ``who``."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=4)
    pids: list[int] = []
    module.on_train_start = lambda: pids.extend(strategy._fit.group.gather(os.getpid()))
    begun = 0

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        nonlocal begun
        begun += 1
        if rank == 1 and begun == at + 1:
            os.kill(pids[who], signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    return ended(trainer(len(counts), strategy, **options), module, loader(rank, counts[rank]))


@pytest.mark.parametrize(
    ("counts", "who", "at", "options", "steps"),
    [
        ([40, 40, 5], 1, 9, {}, [17, 17, 5]),
        ([5, 9], 1, 2, {"max_epochs": 2}, [5, 9]),  # takes effect in the last batch of an epoch
        ([15, 6], 1, 12, {"max_epochs": -1, "max_steps": 30}, [30, 18]),  # 0 is at the end of fit
    ],
)
def test_all_stop_together(
    counts: list[int], who: int, at: int, options: dict[str, Any], steps: list[int]
) -> None:
    results = run_workers(struck, counts, who, at, options, workers=len(counts), timeout=30)
    assert results == [("SIGTERMException", taken) for taken in steps]


def test_a_signal_to_an_idle_worker_stops_all() -> None:
    results = run_workers(struck, [40, 40, 5], 2, 9, {}, workers=3, timeout=30)
    assert [error for error, _ in results] == ["SIGTERMException"] * 3
    steps = [taken for _, taken in results]
    # Within three rounds; how many depends on which of its headers had left.
    assert steps in [[taken, taken, 5] for taken in (13, 17, 21)]


class TwoOptimizers(Toy):
    """Both step in every batch; the signal comes between them."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for number, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            if number == 0:
                self.manual_backward(loss)
            elif self.global_rank == 1 and batch_idx == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD([self.w]), SGD([self.b])]


def two_optimizers(rank: int) -> Any:
    return ended(trainer(2, EASGDStrategy(tau=1)), TwoOptimizers(), loader(rank, [3, 20][rank]))


def test_several_optimizers_stop_with_an_idle_worker() -> None:
    results = run_workers(two_optimizers, workers=2, timeout=30)
    assert [error for error, _ in results] == ["SIGTERMException"] * 2


def interrupted(rank: int, folder: Path, who: int | None, validate: bool, path: Path | None) -> Any:
    """Worker 0 has 22 batches, worker 1 has 5; ``who`` is struck while worker 1 is idle."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=4)
    if validate:
        module.validation_step = lambda batch, batch_idx: None
    seen: list[tuple[int, int, int]] = []
    saving = ModelCheckpoint(folder, every_n_epochs=100, save_on_exception=True)
    options = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(2, strategy, num_sanity_val_steps=0, **options)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        seen.append((fitting.current_epoch, batch_idx, strategy._fit.exchange.clock))
        if rank == who and fitting.current_epoch == 0 and batch_idx == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    loaders = [Resumable(rank, [22, 5][rank]), *([loader(0, 2)] if validate else [])]
    error, steps = ended(fitting, module, *loaders, ckpt_path=path)
    return error, steps, seen[-5:], {n: v.tobytes() for n, v in weights(module).items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("validate", [False, True])
def test_resuming_where_one_stood_still_goes_on_bit_for_bit(validate: bool, tmp_path: Path) -> None:
    straight = run_workers(interrupted, tmp_path / "straight", None, validate, None, workers=2)
    stopped = run_workers(interrupted, tmp_path / "stopped", 0, validate, None, workers=2)
    assert [error for error, *_ in stopped] == ["SIGTERMException"] * 2
    (path,) = (tmp_path / "stopped").glob("*.ckpt")
    resumed = run_workers(interrupted, tmp_path / "stopped", None, validate, path, workers=2)
    assert resumed == straight


def late(rank: int, reached: Any) -> Any:
    """SIGTERM to worker 0 while it waits at the end, and no exchange is left to say so."""
    module = Toy(SGD)
    if rank == 1:
        module.on_train_epoch_end = reached.wait
    else:

        def on_train_epoch_end() -> None:
            def strike() -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                reached.set()

            threading.Timer(0.5, strike).start()

        module.on_train_epoch_end = on_train_epoch_end
    return ended(trainer(2, EASGDStrategy(tau=4, final_exchange=False)), module, loader(rank, 6))


def test_a_signal_while_waiting_at_the_end_is_not_lost() -> None:
    reached = torch.multiprocessing.get_context("fork").Event()
    results = run_workers(late, reached, workers=2, timeout=30)
    assert results[0][0] == "SIGTERMException"


class Stopping(Toy):
    """Sets ``trainer.should_stop`` after a batch, and counts its validations."""

    def __init__(self, at: int | None) -> None:
        super().__init__(SGD)
        self.at, self.validations = at, 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at:
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += 1
        self.log("size", self.w.norm(), sync_dist=True)


def should_stop(rank: int, folder: Path, at: list[int | None], counts: list[int]) -> Any:
    module, saving = Stopping(at[rank]), ModelCheckpoint(folder, monitor="size")
    options = {"max_epochs": 3, "callbacks": [saving], "enable_checkpointing": True}
    fitting = trainer(2, EASGDStrategy(tau=4, exchange_timeout=5), **options)
    fitting.fit(module, loader(rank, counts[rank]), loader(0, 1))
    assert fitting.current_epoch == 1
    return fitting.global_step, module.validations, weights(module)["w"].tobytes()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("counts", [[24, 24], [24, 30]])
@pytest.mark.parametrize(
    ("at", "steps"), [([10, None], [10, 17]), ([None, 12], [17, 12]), ([10, 10], [10, 10])]
)
def test_who_stops_alone_waits_for_the_others_who_stop_within_two_rounds(
    at: list[int | None], steps: list[int], counts: list[int], tmp_path: Path
) -> None:
    results = run_workers(should_stop, tmp_path, at, counts, workers=2, timeout=40)
    assert [taken for taken, *_ in results] == steps
    assert [validations for _, validations, _ in results] == [2, 2]  # the first is Lightning's own
    assert results[0][2] == results[1][2]
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


def too_late(rank: int, folder: Path) -> None:
    """Worker 0 stops by itself when an epoch is over; the other begins the next one."""
    module = Toy(SGD)
    if rank == 0:
        module.on_train_epoch_end = lambda: setattr(module.trainer, "should_stop", True)
    saving = {"enable_checkpointing": True, "default_root_dir": folder}
    strategy = EASGDStrategy(tau=4, exchange_timeout=1)
    trainer(2, strategy, max_epochs=2, **saving).fit(module, loader(rank, 10))


def test_who_stops_alone_where_others_save_without_it_is_an_error_on_all(tmp_path: Path) -> None:
    for outcome in run_workers(too_late, tmp_path, workers=2, timeout=40, check=False):
        assert outcome.error == "ExchangeError"
        assert "All workers are alive, but one is too late, or waits for" in outcome.message


def after_finder(rank: int, folder: Path) -> Any:
    os.chdir(folder)
    module = Toy(SGD)
    module.lr = 0.1
    places: list[Phase] = []
    meet = Exchange.meet
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    fitting = trainer(2, EASGDStrategy(tau=2), callbacks=[finder])

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 5 and fitting.fit_loop.max_steps == -1:
            places.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "meet", lambda self, at: [places.append(at), meet(self, at)][1])
        return *ended(fitting, module, loader(rank, [20, 21][rank])), places


def after_short_search(rank: int, folder: Path) -> int:
    os.chdir(folder)
    module = Toy(SGD)
    module.lr = 0.1
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=0.9)
    fitting = trainer(2, EASGDStrategy(tau=2), callbacks=[finder])
    fitting.fit(module, loader(rank, 40))
    assert len(finder.optimal_lr.results["lr"]) < 30
    return fitting.global_step


def test_a_search_that_stops_early_does_not_stop_the_training_after_it(tmp_path: Path) -> None:
    assert run_workers(after_short_search, tmp_path, workers=2, timeout=40) == [40, 40]


def test_signals_are_passed_on_after_the_learning_rate_finder(tmp_path: Path) -> None:
    results = run_workers(after_finder, tmp_path, workers=2, timeout=40)
    assert [result[:2] for result in results] == [("SIGTERMException", 9)] * 2
    assert results[1][2] == [Phase.STOP]
