"""Sweeps of scripts/train.py: their tables, other sweepers and launchers."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from processes import run_script
from reporting.runs import find, table

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = [
    *("model=mlp", "data.batch_size=64", "trainer.devices=2", "trainer.max_epochs=1"),
    *("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    "logger=none",
    "hydra.sweep.dir=sweep",
]


def needs(plugin: str) -> None:
    """Skip where a plugin of Hydra is not installed."""
    try:
        importlib.import_module(f"hydra_plugins.{plugin}")
    except ImportError:
        pytest.skip(f'{plugin} is not installed: pip install -e ".[sweep]"')


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep" / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_ends_with_a_table_of_what_varied_and_what_came_of_it(tmp_path: Path) -> None:
    overrides = ["-m", *SHORT, "strategy.tau=2,x,8", "objective=test/accuracy"]
    printed = run_script(SCRIPT, overrides, folder=tmp_path, workers=None, code=1)
    first, failed, last = rows(tmp_path)
    assert [row["strategy.tau"] for row in (first, failed, last)] == ["2", "x", "8"]
    report = json.loads((tmp_path / "sweep" / "0" / "report.json").read_text())
    assert float(first["objective"]) == report["tested"]["test/accuracy"]
    assert float(first["MB sent"]) == report["bytes_sent"] / 1e6
    assert float(first["seconds"]) > 0
    assert "optimizer.lr" not in first
    assert failed["error"].startswith("tau='x' is not a communication period.")
    assert failed["objective"] == last["error"] == ""
    header, *lines = printed[printed.index("  job  strategy.tau") :].splitlines()[:4]
    columns = "job strategy.tau objective test/loss test/accuracy seconds MB sent"
    assert header.split() == columns.split()
    assert [line.split()[:2] for line in lines] == [["0", "2"], ["1", "x"], ["2", "8"]]
    during, at_the_end = printed.split("1 job(s) of the sweep failed:\n")
    assert f"error: job 1: {failed['error']}\n" in during
    (line,) = at_the_end.strip().splitlines()
    assert line.startswith("job 1 [model=mlp ")
    assert line.endswith(f"in {tmp_path}/sweep/1: {failed['error']}")
    assert "Traceback" in (tmp_path / "sweep" / "1" / "error.log").read_text()
    _, *reported = table(find([tmp_path / "sweep"]))  # as scripts/report.py reads it
    kept = [name for name in first if name != "objective"]
    assert [["" if v is None else str(v) for v in row] for row in reported] == [
        [row[name] for name in kept] for row in (first, failed, last)
    ]


def test_what_an_earlier_sweep_left_in_the_folder_is_not_counted(tmp_path: Path) -> None:
    for taus in ("2,4", "8,"):
        overrides = ["-m", *SHORT, f"strategy.tau={taus.strip(',')}", "train=false", "test=false"]
        run_script(SCRIPT, overrides, folder=tmp_path, workers=None)
    assert [row["job"] for row in rows(tmp_path)] == ["0"]


def typed(folder: Path, *overrides: str) -> str:
    """What is printed where a user types it: the launcher finds the script by its name."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "-m", *SHORT, *overrides],
        cwd=folder,
        timeout=170,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_search_ends_a_poor_run_early_and_names_the_best_with_its_command(tmp_path: Path) -> None:
    needs("hydra_optuna_sweeper")
    threshold = "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner"
    search = [
        *("hparams_search=optuna", "hydra.sweeper.n_trials=2", "hydra/sweeper/sampler=random"),
        *("hydra.sweeper.sampler.seed=8", "optimizer.lr=choice(1e-9,0.3)", "trainer.max_epochs=2"),
        *("strategy.tau=4", "strategy.beta=0.9", threshold, "hydra.sweeper.pruner.lower=0.5"),
    ]
    printed = run_script(SCRIPT, ["-m", *SHORT, *search], folder=tmp_path, workers=None)
    by_rate = {row["optimizer.lr"]: row for row in rows(tmp_path)}
    poor, good = by_rate["1e-09"], by_rate["0.3"]
    assert (poor["ended early"], good["ended early"]) == ("yes", "no")
    assert poor["test/accuracy"] == ""
    assert float(poor["objective"]) < 0.5 < float(good["objective"])
    reports = (tmp_path / "sweep" / row["job"] / "report.json" for row in (poor, good))
    early, whole = (json.loads(path.read_text())["steps"] for path in reports)
    assert 2 * early == whole
    (best,) = (line for line in printed.splitlines() if line.startswith("  best "))
    assert f"job {good['job']}," in best
    (command,) = (line for line in printed.splitlines() if line.startswith("  command "))
    assert "optimizer.lr=0.3" in command
    assert "hydra." not in command


def test_joblib_runs_jobs_at_a_time(tmp_path: Path) -> None:
    needs("hydra_joblib_launcher")
    typed(tmp_path, "launcher=joblib", "strategy.tau=2,8")
    assert [row["strategy.tau"] for row in rows(tmp_path)] == ["2", "8"]


def test_slurm_starts_as_many_tasks_as_there_are_workers() -> None:
    needs("hydra_submitit_launcher")
    with initialize_config_dir(str(SCRIPT.parents[1] / "conf"), version_base="1.3"):
        cfg = compose("train", ["launcher=slurm", "trainer.devices=3"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.cpus_per_task) == (1, 3, 4)
    assert launcher._target_.endswith("SlurmLauncher")
