"""scripts/compare.py where contenders try learning rates: order, pairs, kills and failures."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from comparing.comparison import Comparison
from comparing.plan import Plan
from comparing.result import Job, Point, Result
from comparing.table import Table
from hydra import compose, initialize_config_dir
from processes import processes_of, run_script, until_written

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare.py"
SMALL = [
    *("preset=accuracy", "data=digits", "model=mlp", "model.hidden=[16]", "taus=[1]"),
    *("workers=2", "epochs=1", "seeds=2", "tuning_seeds=1", "rates=[0.05,0.1]"),
]

RATES = {"ddp": [0.1, 0.2], "easgd": [0.1, 0.2]}
PLAN = Plan(entries=[("ddp", None), ("easgd", 4)], rates=RATES, seeds=range(4), tuning=2)


def finished(plan: Plan, count: int, accuracies: dict[tuple[str, float], float | None]) -> Any:
    """What is found by the first jobs of a plan, with a seed's own luck added."""
    found: dict[Job, Result] = {}
    for _ in range(count):
        job = next(job for job in plan.jobs(found) if job not in found)
        accuracy = accuracies[job.contender, job.rate or 0.0]
        found[job] = Result(
            **asdict(job),
            score=accuracy and accuracy + 0.01 * job.seed**2,
            sent_bytes=1.0 if job.contender == "ddp" else 0.25,
            ddp_bytes=1.0,
            points=(Point(9.0, 1, 1, score=0.3), Point(20.0 * (accuracy or 0), 2, 2, score=0.6)),
        )
    return found


def test_all_try_all_rates_before_the_best_ones_go_on_seed_by_seed() -> None:
    best = {("ddp", 0.1): 0.5, ("ddp", 0.2): 0.6, ("easgd", 0.1): 0.4, ("easgd", 0.2): None}
    found = finished(PLAN, len(PLAN), best)
    tuning = [(job.seed, job.contender, job.rate) for job in islice(found, 8)]
    assert tuning == sorted(tuning)
    assert [(job.seed, job.contender, job.rate) for job in islice(found, 8, None)] == [
        *((2, "ddp", 0.2), (2, "easgd", 0.1), (3, "ddp", 0.2), (3, "easgd", 0.1))
    ]
    assert all(job in found for job in PLAN.jobs(found))


def test_before_the_tuning_of_a_contender_is_over_no_other_seed_of_it_runs() -> None:
    alike = {(name, rate): 0.5 for name, _ in PLAN.entries for rate in (0.1, 0.2)}
    found = finished(PLAN, 7, alike)
    left = [job for job in PLAN.jobs(found) if job not in found]
    assert left == [Job("easgd", 4, 0.2, 1), Job("ddp", None, 0.1, 2), Job("ddp", None, 0.1, 3)]


def test_differences_are_of_runs_with_the_same_seed() -> None:
    accuracies = {("ddp", 0.1): 0.5, ("ddp", 0.2): 0.6, ("easgd", 0.1): 0.4, ("easgd", 0.2): None}
    titles = {"ddp": "DDP", "easgd": "EASGD"}
    metric = "val/accuracy"
    told = Table(PLAN, titles, metric, "ddp").text(finished(PLAN, len(PLAN), accuracies))
    assert [" ".join(line.split()) for line in told.splitlines()] == [
        "accuracy, % at η = 0.1 at η = 0.2 best η mean seeds to DDP bytes sent",
        "DDP 50.50 60.50 0.2 63.50 ± 2.02 4 - 100.0 % of DDP's",
        "EASGD, τ = 4 40.50 0.00 0.1 43.50 ± 2.02 4 -20.00 ± 0.00 25.0 % of DDP's",
    ]
    early = Table(PLAN, titles, metric).text(finished(PLAN, 3, accuracies))
    assert [" ".join(line.split()) for line in early.splitlines()] == [
        "accuracy, % at η = 0.1 at η = 0.2 best η mean seeds bytes sent",
        "DDP - - - 0 -",
        "EASGD, τ = 4 - - - 0 -",
    ]


def test_rates_are_tried_without_the_network_in_runs_that_do_not_count() -> None:
    plan = replace(PLAN, seeds=range(2), tuning=1, network="100mbit", apart=True)
    best = {("ddp", 0.1): 0.5, ("ddp", 0.2): 0.6, ("easgd", 0.1): 0.4, ("easgd", 0.2): 0.3}
    found = finished(plan, len(plan), best)
    assert [(job.contender, job.rate, job.seed, job.network, job.tuning) for job in found] == [
        *(("ddp", 0.1, 0, None, True), ("ddp", 0.2, 0, None, True)),
        *(("easgd", 0.1, 0, None, True), ("easgd", 0.2, 0, None, True)),
        *(("ddp", 0.2, 0, "100mbit", False), ("easgd", 0.1, 0, "100mbit", False)),
        *(("ddp", 0.2, 1, "100mbit", False), ("easgd", 0.1, 1, "100mbit", False)),
    ]
    assert all(job in found for job in plan.jobs(found))
    assert {result.network for result in plan.best(("easgd", 4), found)} == {"100mbit"}
    assert Plan([("a", None)], {"a": [None]}, range(3), 1, "100mbit", apart=True).__len__() == 3


@pytest.mark.parametrize("apart", [False, True])
def test_what_an_earlier_run_of_the_folder_asked_for_besides_is_none_of_its_jobs(
    apart: bool,
) -> None:
    """Or the page would choose among learning rates that the table does not know."""
    plan = replace(PLAN, network="100mbit", apart=apart)
    alike = {(name, rate): 0.5 for name, _ in PLAN.entries for rate in (0.1, 0.2)}
    jobs = list(finished(plan, len(plan), alike))
    assert all(map(plan.has, jobs))
    for job in jobs:
        others = {"rate": 0.3, "seed": 4, "network": "20mbit", "contender": "eamsgd", "hosts": 8}
        others |= {"tau": 16, "tuning": not job.tuning}
        assert not any(plan.has(replace(job, **{key: others[key]})) for key in others)
    tried = [job for job in jobs if job.tuning]
    assert not any(plan.has(replace(job, seed=2)) for job in tried)  # rates are tried with 0 and 1


def test_of_bits_per_byte_fewer_are_better() -> None:
    scores = {("ddp", 0.1): 3.0, ("ddp", 0.2): 2.5, ("easgd", 0.1): 2.0, ("easgd", 0.2): None}
    plan = replace(PLAN, seeds=range(1), tuning=1, lower=True)
    found = finished(plan, len(plan), scores)
    assert [plan.best(entry, found)[0].rate for entry in plan.entries] == [0.2, 0.1]
    titles = {"ddp": "DDP", "easgd": "EASGD"}
    told = Table(plan, titles, "val/bits_per_byte", "ddp", 0.6).text(found)
    first, ddp, easgd = (" ".join(line.split()) for line in told.splitlines())
    assert first.startswith("bits per byte at η = 0.1")
    assert ddp == "DDP 3.000 2.500 0.2 2.500 1 - 9.0 s - 100.0 % of DDP's"
    assert easgd == "EASGD, τ = 4 2.000 inf 0.1 2.000 1 -0.500 9.0 s +0 % 25.0 % of DDP's"


def test_the_time_to_a_target_is_that_of_the_first_test_that_reached_it() -> None:
    same = {(name, rate): 0.5 for name in RATES for rate in (0.1, 0.2)}
    found = finished(PLAN, len(PLAN), same | {("easgd", 0.1): 0.25, ("easgd", 0.2): 0.2})
    titles = {"ddp": "DDP", "easgd": "EASGD"}
    lines = Table(PLAN, titles, "val/accuracy", "ddp", 0.6).text(found).splitlines()
    assert "time to 60.00" in lines[0]
    assert "10.0 ± 0.0 s" in lines[1]
    assert "5.0 ± 0.0 s  -50 ± 0 %" in lines[2]
    never = Table(PLAN, titles, "val/accuracy", "ddp", 0.61).text(found)
    assert never.count("-, 0 of 4 reached it") == 2


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_pairs_begin_alike_and_one_that_fails_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = ["contender=[easgd,ddp,local_sgd]", "train_loss=true"]
    arguments = [f"hydra.run.dir={tmp_path}", *SMALL, *contenders]
    broken = [*arguments, "parallel=3", "+contender.easgd.strategy.alpha=-1"]
    with monkeypatch.context() as patched:  # no page is drawn, as where its packages are missing
        patched.setitem(sys.modules, "presenting.page", None)
        told = run_script(SCRIPT, broken, folder=tmp_path, workers=None, code=1)
    failed = [one for one in results(tmp_path) if one["error"]]
    assert 1 <= len(failed) <= 2  # as many as had begun
    assert {one["contender"] for one in failed} == {"easgd"}
    assert "alpha" in failed[0]["error"]
    assert "error: easgd was left out: easgd, τ = 1, η = " in told
    assert "failed, ValueError" in told.partition("error: easgd was left out")[2]

    found = {
        (one["contender"], one["rate"], one["seed"]): one
        for one in results(tmp_path)
        if one["contender"] != "easgd"
    }
    assert len(found) == 6
    for (name, rate, seed), one in found.items():
        if name == "local_sgd":  # at τ = 1 the mean of the workers moves as under DDP
            assert one["loss"] == pytest.approx(found["ddp", rate, seed]["loss"], rel=1e-4)
            assert one["sent_bytes"] == pytest.approx(one["ddp_bytes"], rel=0.02)

    # What failed runs again once it is mended, one at a time; all else is there.
    count = len(results(tmp_path))
    run_script(SCRIPT, [*arguments, "parallel=1"], folder=tmp_path, workers=None)
    assert {one["contender"] for one in results(tmp_path)[count:]} == {"easgd"}
    count = len(results(tmp_path))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("compare", overrides=[*SMALL, *contenders, "train=false"])
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert Comparison(cfg, tmp_path).run()
    assert len(results(tmp_path)) == count
    assert (tmp_path / "report.html").read_text() == page
    assert "What failed or is missing" in page
    cfg.epochs += 1
    with pytest.raises(ValueError, match=rf"no result of these settings. It has {count} of others"):
        Comparison(cfg, tmp_path).run()
    assert "+0.00 ± 0.00" in capsys.readouterr().out
    assert processes_of(tmp_path) == {}


def test_one_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [
        f"hydra.run.dir={tmp_path}",
        *SMALL,
        "contender=[ddp]",
        "rates=null",
        "factors=[1]",
    ]
    command = [sys.executable, str(SCRIPT), *arguments, "seeds=100"]
    with until_written(tmp_path / "results.jsonl", command):
        pass
    deadline = time.monotonic() + 120
    while processes_of(tmp_path):  # workers follow it by themselves
        assert time.monotonic() < deadline
        time.sleep(0.1)
    count = len(results(tmp_path))
    run_script(SCRIPT, [*arguments, f"seeds={count + 1}"], folder=tmp_path, workers=None)
    assert [one["seed"] for one in results(tmp_path)] == [*range(42, 43 + count)]


def test_one_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    arguments = [f"hydra.run.dir={tmp_path}", *SMALL, "contender=[ddp]", "job_timeout=0.01"]
    told = run_script(SCRIPT, arguments, folder=tmp_path, workers=None, code=1)
    assert "not all workers were back after 0.01 s (job_timeout)" in told
    assert processes_of(tmp_path) == {}
