"""The search for settings: what it tells its study, and how it goes on."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hydra_plugins.search import Search, _alone_in
from lightning.pytorch.trainer.states import TrainerFn
from objective import Prune
from searching import Rivals, study_of

CONF = str(Path(__file__).parents[2] / "conf")
ENDED = {"error": None, "pruned": False, "validations": []}


class Launched:
    """Stands for Hydra's launcher: each job leaves the next record, or raises it."""

    def __init__(self, folder: Path, records: list[Any]) -> None:
        self.folder, self.records = folder, records
        self.jobs: dict[int, list[str]] = {}

    def launch(self, jobs: list[list[str]], *, initial_job_idx: int) -> list[Any]:
        for number, overrides in enumerate(jobs, initial_job_idx):
            record = self.records.pop(0)
            if isinstance(record, BaseException):
                raise record
            self.jobs[number] = overrides
            job = {"job": number}
            (self.folder / str(number) / "job.json").write_text(json.dumps(ENDED | job | record))
        return [SimpleNamespace(return_value=None) for _ in jobs]


@pytest.fixture
def optuna() -> Any:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the SQLAlchemy that it imports
        return pytest.importorskip("optuna")


@pytest.fixture
def search(tmp_path: Path, optuna: Any) -> Any:
    """Makes a search over ``records``; what was launched."""

    def start(
        records: list[Any], *typed: str, trials: int = 3, hydra: Sequence[str] = ()
    ) -> Launched:
        overrides = [
            *("hparams_search=optuna", "hydra.sweeper.sampler.seed=1"),
            *(f"hydra.sweep.dir={tmp_path}", f"hydra.sweeper.n_trials={trials}"),
            *(f"{'' if '=' in each else '~'}hydra.sweeper.{each}" for each in hydra),
        ]
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("train", overrides, return_hydra_config=True)
        made = instantiate(cfg.hydra.sweeper, _target_=Search)
        made.config, made.launcher = cfg, Launched(tmp_path, records)
        made.sweep([*typed])
        return made.launcher

    return start


def settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Of all runs, those that were stopped too."""
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/trial.json"))}


def test_optuna_learns_from_each_run_what_it_came_to(search: Any, tmp_path: Path) -> None:
    records = [
        {"objective": 0.9, "validations": [0.8, 0.9]},
        {"objective": 0.1, "validations": [0.1], "pruned": True},
        {"objective": None, "error": "ValueError: no data"},
        {"objective": math.nan},
    ]
    launched = search(records, "model=mlp", trials=4)
    study = study_of(tmp_path, "maximize")
    found = [(each.state.name, each.intermediate_values) for each in study.trials]
    assert found == [
        *(("COMPLETE", {0: 0.8, 1: 0.9}), ("PRUNED", {0: 0.1})),
        *(("FAIL", {}), ("FAIL", {})),
    ]
    assert study.best_value == 0.9
    assert (launched.jobs[1][0], launched.jobs[1][-1]) == ("model=mlp", "hydra.sweep.subdir=1")
    assert f"strategy.tau={settings(tmp_path)['1']['strategy.tau']}" in launched.jobs[1]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_one_that_is_stopped_goes_on_with_what_is_left(
    search: Any, stop: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(stop)):
        search([{"objective": 0.5}, stop])
    stopped, command = capsys.readouterr().out.strip().splitlines()
    assert stopped == "The search was stopped; 2 of 3 runs are left."
    assert command.endswith(f" hydra.sweep.dir={tmp_path}")
    assert [*search([{"objective": 0.6}, {"objective": 0.7}]).jobs] == [2, 3]
    drawn = settings(tmp_path)
    assert [*drawn] == ["0", "1", "2", "3"]
    assert len({*map(str, drawn.values())}) == 4  # though its sampler has a seed
    assert [trial.value for trial in study_of(tmp_path, "maximize").trials] == [0.5, 0.6, 0.7]
    assert search([]).jobs == {}


def test_runs_of_another_command_are_not_compared(search: Any) -> None:
    search([{"objective": 0.5}], "model=mlp", trials=1)
    with pytest.raises(ValueError, match=r"then model=mlp; now model=cnn\."):
        search([], "model=cnn")
    with pytest.raises(ValueError, match="then objective: val/accuracy, maximize; now"):
        search([], "model=mlp", hydra=["direction=minimize"])
    with pytest.raises(ValueError, match=r"then .*high=0.3.*; now .*high=0.5"):
        search([], "model=mlp", "optimizer.lr=tag(log,interval(0.01,0.5))")


def test_what_is_typed_is_not_looked_for_and_a_range_is(search: Any, tmp_path: Path) -> None:
    typed = ["strategy.beta=null", "strategy.rho=interval(0.1,2)", "optimizer.lr=0.1"]
    launched = search([{"objective": 0.5}], *typed, trials=1)
    assert {*settings(tmp_path)["0"]} == {"strategy.tau", "strategy.rho"}
    assert {"strategy.beta=null", "optimizer.lr=0.1"} < {*launched.jobs[0]}
    with pytest.raises(ValueError, match="has nothing to look for"):
        search([], "strategy.tau=4", "strategy.beta=1", "optimizer.lr=0.1")


def test_two_at_a_time_are_launched_together_and_have_different_settings(
    search: Any, tmp_path: Path
) -> None:
    search([{"objective": 0.5}, {"objective": 0.6}, {"objective": 0.7}], hydra=["n_jobs=2"])
    assert len({*map(str, settings(tmp_path).values())}) == 3


@pytest.mark.parametrize(
    ("hydra", "why"),
    [
        (["direction=up"], "direction=up is not possible. Allowed are maximize"),
        (["pruner={_target_:optuna.pruners.NopPruner}"], "got NopPruner. Allowed are .* null"),
    ],
)
def test_what_is_not_possible_is_refused(search: Any, hydra: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        search([], hydra=[*hydra, "pruner.n_startup_trials", "pruner.n_warmup_steps"])


def test_only_one_search_at_a_time_has_a_folder(search: Any, tmp_path: Path) -> None:
    with _alone_in(tmp_path), pytest.raises(ValueError, match="A search goes on in"):
        search([])


class Judged(Rivals):
    """Answers as told, and keeps what it was asked."""

    def __init__(self, *answers: bool) -> None:
        object.__setattr__(self, "answers", [*answers])
        object.__setattr__(self, "asked", [])

    def judge(self) -> Any:
        def judge(value: float) -> bool:
            self.asked.append(value)
            return self.answers.pop(0)

        return judge


def trainer(*, rank: int = 0, others: bool = False, value: float = 0.5, **state: Any) -> Any:
    return SimpleNamespace(
        **{"state": SimpleNamespace(fn=TrainerFn.FITTING), "sanity_checking": False} | state,
        is_global_zero=rank == 0,
        callback_metrics={"val/accuracy": value},
        strategy=SimpleNamespace(reduce_boolean_decision=lambda mine, all: mine or others),
        should_stop=False,
    )


def validate(prune: Prune, on: Any) -> bool:
    prune.on_validation_end(on, on)
    return on.should_stop and prune.pruned


def test_a_run_ends_by_the_first_workers_answer_at_a_validation() -> None:
    judged = Judged(False, True)
    prune = Prune("val/accuracy", judged)
    assert not validate(prune, trainer(sanity_checking=True))
    assert not validate(prune, trainer(state=SimpleNamespace(fn=TrainerFn.VALIDATING)))
    assert not validate(prune, trainer(value=0.25))
    assert validate(prune, trainer())
    assert judged.asked == [0.25, 0.5]


def test_other_workers_ask_nobody_and_follow_the_first() -> None:
    prune = Prune("val/accuracy", Judged())
    assert not validate(prune, trainer(rank=1))
    assert validate(prune, trainer(rank=1, others=True))


def test_a_run_that_diverged_ends_without_a_question() -> None:
    assert validate(Prune("val/accuracy", Judged()), trainer(value=math.nan))


def test_workers_at_their_own_pace_cannot_be_ended_together() -> None:
    on = trainer()
    on.strategy.solo = True
    with pytest.raises(ValueError, match=r"Set hydra\.sweeper\.pruner=null"):
        Prune("val/accuracy", Judged()).setup(on, on, "fit")


@pytest.mark.parametrize(("direction", "ends"), [("maximize", [0.2]), ("minimize", [0.9])])
def test_a_run_is_judged_by_the_median_of_others_at_the_same_validation(
    tmp_path: Path, optuna: Any, direction: str, ends: list[float]
) -> None:
    pruner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2}
    rivals = Rivals(tmp_path, tmp_path / "9", direction, pruner)

    def ended(number: int, *values: float) -> None:
        (tmp_path / str(number)).mkdir(exist_ok=True)
        job = {"job": number, "objective": values[-1], "validations": values}
        (tmp_path / str(number) / "job.json").write_text(json.dumps(ENDED | job))

    (tmp_path / "9").mkdir()
    ended(0, 0.4, 0.8)
    assert not any(rivals.judge()(value) for value in (0.2, 0.9))  # one is not enough
    ended(1, 0.6, 0.8)
    assert [value for value in (0.2, 0.9) if rivals.judge()(value)] == ends
    judge = rivals.judge()
    judge(0.5)
    assert judge(0.7) == (direction == "maximize")
    assert json.loads((tmp_path / "9" / "validations.json").read_text()) == [0.5, 0.7]
