"""A worker that has finished waits for the others while they get on, and no longer."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Workers
from toy import Toy, loader, trainer

from lightning_easgd import CenterAt, EASGDStrategy
from lightning_easgd.communication import ExchangeError
from lightning_easgd.exchange.teammates import Teammates
from lightning_easgd.server.values import News

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")

pytestmark = pytest.mark.timeout(90)


class Heard:
    """Hears every second."""

    def __init__(self, timeout: float = 100.0) -> None:
        self.now = 0.0
        self.others = Teammates(timeout, clock=lambda: self.now)

    def hear(self, training: int, after: float = 1.0, **progress: int) -> None:
        self.now += after
        named = {name.replace("_", "/"): count for name, count in progress.items()}
        self.others.hear(News(training, named, False))


def test_workers_that_get_on_are_awaited_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lightning_easgd")
    heard = Heard()
    for second in range(1000):
        heard.hear(2, run_1=second // 15, run_2=second // 19)
    heard.hear(0)
    assert not caplog.messages


def test_one_that_stands_is_named_and_awaited_while_another_gets_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "lightning_easgd")
    heard = Heard()
    for second in range(200):
        heard.hear(2, run_1=7, run_2=second)
    (said,) = caplog.messages
    assert "waits for worker 1. Signs of life come from there, but no progress for 20 s." in said
    for _ in range(100):
        heard.hear(2, run_1=7, run_2=200)
    with pytest.raises(ExchangeError, match=r"worker 1 and worker 2\..* no progress for 100 s"):
        heard.hear(2, run_1=7, run_2=200)


def test_one_that_has_not_come_is_not_blamed() -> None:
    heard = Heard()
    for _ in range(200):
        heard.hear(2, run_1=7)


def test_the_time_in_which_this_worker_was_stopped_does_not_count() -> None:
    heard = Heard()
    heard.hear(1, run_1=7)
    heard.hear(1, after=10_000, run_1=7)


def fit_or_stand(rank: int, folder: Path) -> str:
    module = Toy(partial(torch.optim.SGD, lr=0.05))
    if rank == 1:
        module.on_train_batch_end = lambda *args: time.sleep(200) if args[2] == 7 else None
    center = CenterAt("local", lease=5.0)
    fitting = trainer(2, EASGDStrategy(center=center, tau=2, exchange_timeout=15))
    try:
        fitting.fit(module, loader(rank, 10 + 10 * rank))
    except ExchangeError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("forked_server")
def test_a_worker_that_is_stuck_is_named_by_those_that_have_finished(tmp_path: Path) -> None:
    with Workers(fit_or_stand, tmp_path, workers=2) as group:
        (first,) = group.collect(70, without=1)
    assert first.error is None, first.trace
    assert "waits for worker 1. Signs of life come from there" in first.value
