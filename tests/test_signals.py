"""SIGTERM and time limits on any worker stop all of them at the same step."""

from __future__ import annotations

import logging
import os
import re
import signal
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from inside import recorded_collectives
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


class Said(logging.Handler):
    """What Lightning's logger and ours said of the end of training."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "ime limit" in record.getMessage() or "together" in record.getMessage():
            self.lines.append(record.getMessage())


def timed(rank: int, who: list[int], at: int, options: dict[str, Any]) -> Any:
    """Train with a time limit that passes on the workers ``who`` in batch ``at``."""
    module, said = Toy(SGD), Said()
    options = (
        {"max_time": {"hours": 1}}
        if "max_time" in options
        else {"callbacks": [pl.callbacks.Timer({"hours": 1}, **options)]}
    )
    fitting = trainer(2, EASGDStrategy(tau=4), max_epochs=3, **options)
    (timer,) = [c for c in fitting.callbacks if isinstance(c, pl.callbacks.Timer)]
    calls: list[str] = []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank in who and batch_idx == at:
            timer._offset = 2 * 3600.0

    module.on_train_batch_start = on_train_batch_start
    with recorded_collectives(calls):
        module.on_train_epoch_start = calls.clear
        fitting.fit(module, loader(rank, 18))
    return fitting.global_step, weights(module)["w"].tobytes(), "broadcast" in calls, said.lines


TIMERS_OWN = r"Time limit reached. Elapsed time is 2:00:0\d. Signaling Trainer to stop."


@pytest.mark.parametrize("options", [{"max_time": True}, {}, {"verbose": False}], ids=str)
@pytest.mark.parametrize("who", [[0], [1], [0, 1]], ids=str)
def test_a_time_limit_stops_all_at_the_same_step_without_a_broadcast(
    who: list[int], options: dict[str, Any]
) -> None:
    zero, one = run_workers(timed, who, 5, options, workers=2, timeout=30)
    # Announced at step 8, in force at step 12; a fit that ends well has its final exchange.
    assert zero[:3] == one[:3] == (13, zero[1], False)
    assert one[3] == []
    if not options.get("verbose", True):
        assert zero[3] == []
    elif 0 in who:
        (line,) = zero[3]
        assert re.fullmatch(TIMERS_OWN, line)
    else:
        assert zero[3] == ["Worker(s) 1 reached a time limit: all end their training together."]


def test_a_timer_that_looks_at_the_end_of_epochs_is_lightnings_own() -> None:
    options = {"interval": "epoch"}
    zero, one = run_workers(timed, [0], 5, options, workers=2, timeout=30)
    assert zero[:2] == one[:2] == (18, zero[1])
    (line,) = zero[3]
    assert re.fullmatch(TIMERS_OWN, line)
