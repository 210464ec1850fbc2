"""EASGDMonitor: rows of the loggers, the progress bar, warnings; and telemetry as a table."""

from __future__ import annotations

import csv
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from processes import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDMonitor, EASGDStrategy, Telemetry
from lightning_easgd.strategy import monitor
from lightning_easgd.strategy.monitor import _Watched

SGD = partial(torch.optim.SGD, lr=0.1)


class Bar(TQDMProgressBar):
    """Keeps what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def get_metrics(self, *args: Any) -> Any:
        found = super().get_metrics(*args)
        self.shown.append(found.get("exchanges"))
        return found


def logged(rank: int, folder: Path) -> tuple[list[Any], list[str], str]:
    """Losses and counters are logged of 10 steps, and validated after them."""
    module, bar, strategy = Toy(SGD), Bar(), EASGDStrategy(tau=4)
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        module.log("loss", loss)
        module.log("mean", loss, on_step=False, on_epoch=True)
        return loss

    module.training_step = training_step
    module.validation_step = lambda batch, batch_idx: module.log("val", 1.0, rank_zero_only=True)
    loggers = [CSVLogger(folder / name, name="", version="") for name in "ab"]
    fitting = trainer(
        2,
        strategy,
        logger=loggers,
        log_every_n_steps=5,
        enable_progress_bar=True,
        num_sanity_val_steps=0,
        callbacks=[EASGDMonitor(progress_bar=True), bar],
    )
    own = vars(fitting._logger_connector).copy()
    fitting.fit(module, loader(rank, 10), loader(rank, 2))
    left = [name for name in vars(fitting._logger_connector) if name not in own]
    return bar.shown, left, str(strategy.telemetry)


def test_all_loggers_and_the_bar_have_the_counters_in_lightnings_own_rows(tmp_path: Path) -> None:
    (shown, left, table), (others, *_) = run_workers(logged, tmp_path, workers=2)
    assert left == []  # of what stood in the place of Lightning's methods
    for name in "ab":
        rows = list(csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines()))
        found = [{key for key, value in row.items() if value} for row in rows]
        assert [row["step"] for row in rows] == ["4", "9", "9", "9"]
        of_steps, validated, of_epoch = found[:2], found[2], found[3]
        assert all({"loss", "easgd/exchanges", "easgd/tau"} <= row for row in of_steps)
        assert {"mean", "easgd/exchanges"} <= of_epoch
        assert "val" in validated
        assert not any(key.startswith("easgd/") for key in validated)
        assert {f"easgd/worker_wait_seconds/{rank}" for rank in (0, 1)} <= of_epoch
        assert rows[1]["easgd/exchanges"] == "2.0"
    assert "τ 4 · " in shown[-1]
    assert "% of DDP's bytes · waited " in shown[-1]
    assert set(others) <= {None}
    lines = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert lines["exchanges"] == "3"
    assert lines["bytes_sent"].endswith(" MB")
    assert lines["worker_wait_seconds/1"].endswith(" s") or "ms" in lines["worker_wait_seconds/1"]


def test_under_another_strategy_it_warns_and_does_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fitting = trainer(1, "auto", callbacks=[EASGDMonitor(progress_bar=True)], logger=logger)
    with pytest.warns(UserWarning, match="does nothing under SingleDeviceStrategy"):
        fitting.fit(Toy(SGD), loader(0, 3))
    assert fitting.global_step == 3
    assert "exchanges" not in fitting.progress_bar_metrics


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One round of 1 s after the other, with a distance and a wait."""
    now = 100.0
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now)
    telemetry = Telemetry(tau=7, ddp_bytes_per_step=100)
    watch = _Watched(telemetry)

    def round_(distance: float = 0.1, wait: float = 0.0) -> list[str]:
        nonlocal now
        now += 1
        telemetry.exchanges += 1
        telemetry.steps += 7
        telemetry.bytes_sent += 100
        telemetry.consensus_distance = distance
        telemetry.wait_seconds += wait
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.look()
            watch.look()  # the same exchange
        return [str(warning.message) for warning in caught]

    round_.watch = watch
    return round_


def test_workers_that_drift_apart_are_said_once(watched: Any) -> None:
    said = [watched(distance) for distance in (0.5, 1.5, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5)]
    assert [len(each) for each in said] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert "Workers drift apart" in said[5][0]
    assert "= 1.30" in said[5][0]


def test_exchanges_that_stop_hiding_are_said_once(watched: Any) -> None:
    assert not any(watched(wait=0.2) for _ in range(20))
    assert watched.watch.shown == "τ 7 · 14.3 % of DDP's bytes · waited 20.0 %"
    assert watched(wait=30.0) == []  # one long wait alone, for whatever happened
    said = [watched(wait=0.8) for _ in range(12)]
    assert [len(each) for each in said] == [0, 0, 0, 0, 1, *[0] * 7]  # with the long one, 6 of 10
    assert "Exchanges do not hide" in said[4][0]
    assert "raise tau (now 7)" in said[4][0]


def test_how_stale_differences_are_is_shown_where_a_server_has_the_center(watched: Any) -> None:
    watched.watch._telemetry.count_staleness(3)
    watched()
    assert watched.watch.shown == "τ 7 · 14.3 % of DDP's bytes · staleness 3.0 · waited 0.0 %"


def test_telemetry_is_a_table() -> None:
    telemetry = Telemetry(steps=10, bytes_sent=2_500_000, wait_seconds=0.0123, tau=5)
    telemetry.count_waits([0.5, 12.0])
    lines = dict(line.split(maxsplit=1) for line in str(telemetry).splitlines())
    assert lines["steps"] == "10"
    assert lines["bytes_sent"] == "2.50 MB"
    assert lines["wait_seconds"] == "12.3 ms"
    assert lines["worker_wait_seconds/1"] == "12 s"
