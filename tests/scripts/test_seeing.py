"""What a run has written, as curves and on the screen, while it runs and afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from seeing.curves import choose_panels, draw
from seeing.rows import Rows
from seeing.screen import end, sparkline

SCRIPT = Path(__file__).parents[2] / "scripts" / "watch.py"
HEADER = (
    "easgd/bytes_sent,easgd/consensus_distance,easgd/ddp_bytes_sent,easgd/exchanges,easgd/seconds,"
    "easgd/tau,easgd/worker_awaited_seconds/0,easgd/worker_awaited_seconds/1,"
    "easgd/worker_wait_seconds/0,easgd/worker_wait_seconds/1,epoch,step,"
    "train/loss,val/accuracy,val/loss"
)
ROWS = [
    "1000000,0.1,10000000,1,10.0,10,0,0,0,0,0,9,2.0,,",
    ",,,,,,,,,,0,14,,0.5,1.5",
    "2000000,0.3,20000000,2,20.0,10,0.25,7.5,7.75,0.5,0,19,1.0,,",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run under way, whose latest row is half written."""
    folder = tmp_path / "run"
    (folder / "csv" / "version_0").mkdir(parents=True)
    text = "\n".join([HEADER, *ROWS, "3000000,0.9"])
    (folder / "csv" / "version_0" / "metrics.csv").write_text(text)
    (folder / "worker1.log").write_text("fine\nUserWarning: too hot\nfine again\n")
    return folder


def finish(run: Path) -> None:
    report = {"strategy": "easgd", "model": "CNN", "train_seconds": 20.5, "strength": None}
    (run / "report.json").write_text(json.dumps(report))


def watch(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={"COLUMNS": "200", "PYTHONPATH": str(SCRIPT.parent), "PYTHONUTF8": "1"},
        timeout=30,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_a_run_under_way_is_shown_once(run: Path) -> None:
    shown = watch(str(run), "--once")
    assert f"{run}: runs, at step 20; the latest row is " in shown
    for text in (
        "train/loss 1 █▁",
        "val/accuracy 0.5",
        "exchanges 2, τ = 10",
        "sent 2.00 MB, 10 % of DDP's",
        "distance 0.3 ▁█",
        "worker 0 waited 7.75 s, was waited for 0.25 s, of 20.0 s",
        "worker 1 waited 0.50 s, was waited for 7.50 s, of 20.0 s",
        "worker1: UserWarning: too hot",
    ):
        assert text in shown
    assert "fine" not in shown


def test_a_run_that_ended_is_shown_with_its_report(run: Path) -> None:
    finish(run)
    shown = watch(str(run))
    assert f"{run}: ended" in shown
    assert "strategy easgd model CNN train_seconds 20.5" in shown
    assert "strength" not in shown


def test_a_run_that_goes_on_after_its_end_is_under_way(run: Path) -> None:
    finish(run)
    (run / "steps").write_text("57          ")
    later = (run / "report.json").stat().st_mtime + 10
    os.utime(run / "steps", (later, later))
    assert end(run) == ""
    assert f"{run}: runs, at step 57; " in watch(str(run), "--once")
    (run / "stopped.log").write_text("The run was stopped by Ctrl-C.")
    os.utime(run / "stopped.log", (later + 1, later + 1))
    assert f"{run}: stopped, see stopped.log" in watch(str(run))
    os.utime(run / "steps", (later + 2, later + 2))
    (run / "error.log").write_text("Traceback")
    os.utime(run / "error.log", (later + 3, later + 3))
    assert f"{run}: failed, see error.log" in watch(str(run))


def test_watching_ends_with_the_run(run: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(run), "--seconds=0.1"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                watching.wait(2)
            finish(run)
            shown, _ = watching.communicate(timeout=30)
        finally:
            watching.kill()
    assert watching.returncode == 0
    assert "ended" in shown


def test_a_folder_that_is_none_or_empty_is_said(tmp_path: Path) -> None:
    assert "missing is no folder. Give the folder" in watch(str(tmp_path / "missing"), code=1)
    assert "nothing is logged yet" in watch(str(tmp_path), "--once")


def test_curves_are_drawn_over_steps_and_time(run: Path) -> None:
    rows = Rows(run)
    panels = dict(choose_panels(rows))
    assert list(panels) == ["loss", "metrics", "distance ‖x − c‖/‖c‖", "waited, in seconds"]
    assert list(panels["loss"]) == ["train/loss", "val/loss"]
    assert list(panels["metrics"]) == ["val/accuracy"]
    assert list(panels["waited, in seconds"]) == ["worker 0", "worker 1"]
    assert rows.seconds([9, 14, 19, 99]) == [10.0, 15.0, 20.0, 20.0]
    path = draw(run)
    assert path == run / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_time_goes_on_where_a_run_does(tmp_path: Path) -> None:
    rows = [(9, 10.0), (19, 20.0), (29, 5.0), (39, 15.0), (49, 1.0)]
    text = "".join(f"{step},{seconds}\n" for step, seconds in rows)
    (tmp_path / "metrics.csv").write_text(f"step,easgd/seconds\n{text}")
    assert Rows(tmp_path).seconds([9, 19, 29, 34, 39, 49]) == [10.0, 20.0, 25.0, 30.0, 35.0, 36.0]


def test_a_run_that_logged_nothing_has_no_curves(tmp_path: Path) -> None:
    assert draw(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_exchanges_has_curves_over_steps_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,9,2.0\n0,19,1.0\n")
    rows = Rows(tmp_path)
    assert [title for title, _ in choose_panels(rows)] == ["loss"]
    assert rows.seconds([9]) == []
    assert draw(tmp_path) == tmp_path / "curves.png"


def test_a_sparkline_is_as_long_as_its_values_and_at_most_40() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█"
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline([0.0, float("nan"), 1.0]) == "▁ █"
    assert len(sparkline(range(1000))) == 40
    assert sparkline([]) == ""
