"""scripts/compare.py: its configuration, what it refuses, and a small comparison that goes on."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from comparing.comparison import Comparison
from comparing.job import moving_average
from comparing.report import table
from comparing.result import Result
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig
from processes import processes_of, run_script, until_written

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
SCRIPT = ROOT / "scripts" / "compare.py"
NAMES = sorted(path.stem for path in (CONF / "compared").glob("*.yaml"))
BY_DEFAULT = ["ddp", "local_sgd", "easgd", "eamsgd", "downpour", "adownpour", "mvadownpour"]
SMALL = ["data=digits", "workers=2", "epochs=2", "seeds=1", "taus=[2,16]", "model.hidden=[16]"]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("compare", overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_has_a_title_an_optimizer_and_a_strategy(name: str) -> None:
    cfg = composed(f"compared=[{name}]", "tau=8").compared
    assert list(cfg) == [name]
    assert cfg[name].title
    assert isinstance(instantiate(cfg[name].optimizer), partial)
    strategy = instantiate(cfg[name].strategy)
    assert isinstance(strategy, Strategy)
    period = "4" if name == "delayed_sgd_often_int8" else "8"
    assert name == "ddp" or str(strategy.options.rules.period) == period


def test_by_default_all_are_compared_over_the_periods_of_the_paper() -> None:
    cfg = composed()
    assert list(cfg.compared) == BY_DEFAULT
    assert (cfg.taus, cfg.seeds, cfg.workers) == ([1, 4, 16, 64], 3, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=0", "seeds got 0; allowed is a whole number from 1 on"),
        ("workers=two", "workers got 'two'"),
        ("epochs=1.5", "epochs got 1.5"),
        ("taus=[4,0]", r"taus\[1\] got 0"),
        ("taus=[]", "taus and compared got nothing"),
        ("tuning_seeds=0", "tuning_seeds got 0"),
        ("parallel=0", "parallel got 0"),
        ("rates=[0.1,-1]", "rates got -1; allowed are numbers above 0"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(composed(override), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_moving_average_remembers_as_many_steps_at_every_period() -> None:
    assert moving_average(100, 1).rate == pytest.approx(0.01)
    for tau in (4, 16, 64):
        assert (1 - moving_average(100, tau).rate) ** (1 / tau) == pytest.approx(0.99)


def result(name: str, tau: int | None, seed: int, accuracy: float | None) -> Result:
    loss, diverged = (None, "far") if accuracy is None else (1 - accuracy, None)
    return Result(name, tau, None, seed, score=accuracy, loss=loss, diverged=diverged)


def test_the_table_has_medians_ranges_and_what_diverged() -> None:
    found = [
        *(result("one", 2, seed, accuracy) for seed, accuracy in enumerate([0.5, 0.7, 0.4])),
        *(result("one", 8, seed, accuracy) for seed, accuracy in enumerate([None, 0.6, None])),
        *(result("two", None, seed, None) for seed in range(3)),
    ]
    accuracies, losses = table(found, {"one": "One", "two": "Two"}).split("\n\n")
    assert [" ".join(line.split()) for line in accuracies.splitlines()] == [
        "test accuracy, % τ = 2 τ = 8",
        "One 50.00 (40.00 to 70.00) 60.00, 2 of 3 diverged",
        "Two 3 of 3 diverged 3 of 3 diverged",
    ]
    assert "0.500 (0.300 to 0.600)" in losses


def run(folder: Path, *overrides: str, code: int = 0) -> str:
    arguments = [f"hydra.run.dir={folder}", *SMALL, *overrides]
    return run_script(SCRIPT, arguments, folder=folder, workers=1, code=code)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_small_comparison_and_going_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    downpours = [name for name in BY_DEFAULT if name.endswith("downpour")]
    faster = [f"compared.{name}.optimizer.lr=0.1" for name in downpours]  # than on long runs
    told = run(tmp_path, "taus=[2]", *faster)
    found = results(tmp_path)
    assert [(one["contender"], one["tau"]) for one in found] == [
        (name, None if name == "ddp" else 2) for name in composed().compared
    ]
    assert told.count("about 0 min left") == len(BY_DEFAULT)
    assert all(one["score"] > 0.3 and one["loss"] < 2.3 for one in found)
    assert "diverged" not in told
    assert not (tmp_path / "accuracy.png").exists()

    # Two more periods of two contenders, and what diverges: to NaN, under DDP too, and to worse.
    wild = "compared.downpour.optimizer.lr"
    chosen = ["compared=[ddp,downpour]", "compared.ddp.optimizer.lr=1e30"]
    told = run(tmp_path, *chosen, f"{wild}=1e30", "taus=[2,16]")
    more = results(tmp_path)[len(found) :]
    assert [(one["contender"], one["tau"]) for one in more] == [
        *(("ddp", None), ("downpour", 2), ("downpour", 16))
    ]
    assert "the training loss was nan" in more[0]["diverged"]
    assert "the weights of every worker were NaN" in more[1]["diverged"]
    assert all(one["score"] is None for one in more)
    assert told.count("1 of 1 diverged") == 2 * 4
    assert told.count("1, 1 diverged") == 3
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    # Another seed of a contender: what is known is not trained again, and seeds differ.
    run(tmp_path, "compared=[easgd]", "seeds=2", "taus=[2]")
    (other,) = results(tmp_path)[len(found) + len(more) :]
    (first,) = (one for one in found if one["contender"] == "easgd")
    assert (first["seed"], other["seed"]) == (42, 43)
    assert first["loss"] != other["loss"]
    assert processes_of(tmp_path) == {}


def test_a_signal_leaves_results_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"hydra.run.dir={tmp_path}", *SMALL, "seeds=100"]
    with until_written(tmp_path / "results.jsonl", command) as process:
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert processes_of(tmp_path) == {}
    assert results(tmp_path)
