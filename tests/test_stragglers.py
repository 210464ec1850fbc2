"""Who is waited for is named: while a wait lasts, and in the report."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from interrupted import signs_of_life_come_often
from processes import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy, Telemetry
from lightning_easgd.communication import waiting
from lightning_easgd.communication.waiting import Rounds
from lightning_easgd.workloads import experiment

SGD = partial(torch.optim.SGD, lr=0.1)
STOPPED_SECONDS = 8
STEPS = 60


class Lines(logging.Handler):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("lightning_easgd").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def stop_for_a_while() -> None:
    """As a machine that swaps, or a batch scheduler that suspends its jobs."""
    go_on = f"sleep {STOPPED_SECONDS}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", go_on]):
        os.kill(os.getpid(), signal.SIGSTOP)


def stopped(rank: int, who: int) -> tuple[list[str], dict[str, Any], str]:
    """Worker ``who`` is stopped in a step; what each says, and its report."""
    said, module = Lines(), Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        time.sleep(0.02)
        if rank == who and batch_idx == 42:
            stop_for_a_while()

    module.on_train_batch_start = on_train_batch_start
    fitting = trainer(2, EASGDStrategy(tau=4))
    with_data = partial(experiment.run, train=True, test=False, ckpt_path=None)
    module.train_dataloader = lambda: loader(rank, STEPS)
    report = with_data(fitting, module, None)
    return said.lines, asdict(report), report.table()


@pytest.mark.parametrize("who", [0, 1])
def test_a_worker_that_is_stopped_is_named_while_it_is_and_in_the_report(
    who: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs_of_life_come_often(monkeypatch)
    results = run_workers(stopped, who, workers=2, timeout=60)
    lines, _, _ = results[1 - who]
    (line,) = lines
    how = {  # where worker 0 is is unknown: it keeps what is told
        0: r"does not answer \(killed, stopped or cut off\)",
        1: r"gave no sign of life for \d s \(killed, stopped or cut off\); it gave its last at step"
        r" (\d+) \(.*\)",
    }[who]
    found = re.fullmatch(rf"Worker {1 - who} has waited \d s for worker {who}, which {how}\.", line)
    assert found, line
    assert who == 0 or 0 < int(found[1]) <= 42
    assert results[who][0] == []
    for _, report, table in results:
        awaited, total = report["worker_awaited_seconds"], report["train_seconds"]
        assert STOPPED_SECONDS - 1 < awaited[who] < total
        assert awaited[1 - who] < 1
        assert f"worker {who} was waited for  {awaited[who]:.1f} of {total:.1f} s" in table


def slow(rank: int) -> list[str]:
    """All rounds are as long as the one in which others wait for worker 1, all but the last."""
    waiting._LONG_SECONDS = 0.3
    said, module = Lines(), Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx % 4 == 1:
            time.sleep(5 if batch_idx == 21 else 0.6)

    module.on_train_batch_start = on_train_batch_start
    trainer(3, EASGDStrategy(tau=4, overlap=False)).fit(module, loader(rank, 24))
    return said.lines


def test_a_worker_that_is_always_slow_is_named_when_it_is_slower_than_usual() -> None:
    first, *others = run_workers(slow, workers=3)
    (line,) = first
    assert "for worker 1, which is at step 21 (" in line
    assert others == [[], []]  # once, and not by each that waits


def test_a_long_wait_is_one_of_some_seconds_and_some_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    rounds = Rounds()
    now += 1
    rounds.begin_to_wait(4)
    assert rounds.long == 5.0
    now += 20
    rounds.begin_to_wait(4)  # for the sums of the same exchange
    assert rounds.long == 5.0
    rounds.begin_to_wait(8)
    assert rounds.long == 60.0


def gone_on(rank: int) -> tuple[float, list[float]]:
    """A fit that goes on from one in which this worker had waited for 1000 s."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=4)

    def on_train_start() -> None:
        strategy.telemetry.wait_seconds = 1000.0

    module.on_train_start = on_train_start
    trainer(2, strategy).fit(module, loader(rank, 12))
    return strategy.telemetry.wait_seconds, strategy.telemetry.worker_wait_seconds


def test_waits_of_workers_are_those_of_the_fit() -> None:
    for waited, everybody in run_workers(gone_on, workers=2):
        assert waited > 1000.0
        assert len(everybody) == 2
        assert max(everybody) < 500.0


def test_who_waits_least_at_an_exchange_is_the_one_that_others_wait_for() -> None:
    telemetry = Telemetry()
    telemetry.count_waits([0.0, 0.0, 0.0])
    assert telemetry.worker_awaited_seconds == [0.0, 0.0, 0.0]
    telemetry.count_waits([2.0, 0.5, 2.0])
    telemetry.count_waits([0.0, 1.0, 0.5])
    assert telemetry.worker_awaited_seconds == [1.0, 1.5, 0.0]
    assert telemetry.worker_wait_seconds == [2.0, 1.5, 2.5]


@pytest.mark.parametrize(
    ("awaited", "named"),
    [([0.3, 5.0, 0.4], 1), ([2.5, 5.0, 2.6], None), ([0.0, 0.05, 0.0], None), ([0.1], None)],
)
def test_the_report_names_a_worker_that_stands_out(awaited: list[float], named: int | None) -> None:
    report = experiment.Report(
        strategy="easgd",
        workers=len(awaited),
        train_seconds=20.0,
        worker_awaited_seconds=awaited,
    )
    found = re.findall(r"worker (\d) was waited for +([\d.]+ of 20.0 s)", report.table())
    assert found == ([] if named is None else [(str(named), f"{awaited[named]:.1f} of 20.0 s")])


def test_the_report_of_a_short_run_names_nobody_who_was_waited_for_0_seconds() -> None:
    report = experiment.Report(
        strategy="easgd", workers=2, train_seconds=0.4, worker_awaited_seconds=[0.0, 0.04]
    )
    assert "was waited for" not in report.table()
