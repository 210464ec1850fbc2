"""SIGTERM on any worker stops all of them at the same step."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from processes import run_workers
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)


def stopped(rank: int, who: int, at: int, options: dict[str, Any]) -> Any:
    module, strategy = Toy(SGD), EASGDStrategy(tau=4, **options)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == who and batch_idx == at:
            os.kill(os.getpid(), signal.SIGTERM)

    module.on_train_batch_start = on_train_batch_start
    fitting, error = trainer(2, strategy), None
    try:
        fitting.fit(module, loader(rank, 18))
    except BaseException as raised:
        error = type(raised).__name__
    return error, fitting.global_step, weights(module)["w"].tobytes()


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("options", [{}, {"overlap": False}], ids=str)
@pytest.mark.parametrize(
    ("at", "stops_after"),
    [
        (2, 9),  # seen by the exchange of step 4, takes effect in the step of the next, 8
        (4, 9),
        (5, 13),
    ],
)
def test_sigterm_stops_all_workers_at_the_same_step_within_two_rounds(
    who: int, at: int, stops_after: int, options: dict[str, Any]
) -> None:
    outcomes = run_workers(stopped, who, at, options, workers=2, timeout=30)
    assert [outcome[:2] for outcome in outcomes] == [("SIGTERMException", stops_after)] * 2


@pytest.mark.parametrize("options", [{}, {"final_exchange": False}], ids=str)
def test_sigterm_in_the_last_round_stops_all_workers_at_the_end_with_the_center(
    options: dict[str, Any],
) -> None:
    outcomes = run_workers(stopped, 1, 17, options, workers=2, timeout=30)
    assert [outcome[:2] for outcome in outcomes] == [("SIGTERMException", 18)] * 2
    assert outcomes[0][2] == outcomes[1][2]


def outside_training(rank: int) -> None:
    module = Toy(SGD)

    def test_step(batch: Any, batch_idx: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    module.test_step = test_step
    trainer(2, EASGDStrategy()).test(module, loader(rank, 2), verbose=False)


def test_sigterm_outside_training_ends_that_worker_and_hangs_nobody() -> None:
    """No exchange carries the flag there: the signal ends its process, as it would a single one."""
    outcomes = run_workers(outside_training, workers=2, timeout=30, check=False)
    assert outcomes[1].error == "SIGTERMException"


def replaced(fitting: pl.Trainer) -> tuple[bool, bool]:
    return (
        "_broadcast_sigterm_tensor" in vars(fitting.fit_loop.epoch_loop),
        "_sigterm_notifier_fn" in vars(fitting._signal_connector),
    )


def watch_replacement(rank: int, strategy: str) -> Any:
    module, seen = Toy(SGD), []
    fitting = trainer(1, strategy)
    module.on_train_start = lambda: seen.append(replaced(fitting))
    fitting.fit(module, loader(rank, 2))
    return seen, replaced(fitting)


def test_only_this_trainer_is_changed_and_only_while_it_runs() -> None:
    assert run_workers(watch_replacement, "easgd", workers=1) == [([(True, True)], (False, False))]
    assert run_workers(watch_replacement, "ddp", workers=1) == [([(False, False)], (False, False))]
