"""scripts/reproduce.py: its studies, how findings are judged, and the page from what is stored."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reproduce
from comparing.comparison import Comparison
from comparing.result import Job, Point, Result, WorkerTime
from comparing.store import Store
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from reproducing.evidence import Difference, Evidence, NotTested, Study
from reproducing.findings import FINDINGS, TAUS, WORKERS, Verdict
from reproducing.page import write_page

CONF = Path(__file__).parents[2] / "conf"
SEEDS = (42, 43, 44)
FINDING = {finding.name: finding for finding in FINDINGS}
STEPS = 900


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("reproduce", overrides=list(overrides))


def run(
    name: str, tau: int | None, seed: int, error: float, *, p: int = 4, waits: float = 0.1
) -> Result:
    """Of three tests, whose error falls to that at the end, in %."""
    errors = (error + 9, error + 2 + 0.1 * (seed - 42), error + 0.1 * (seed - 42))
    points = tuple(
        Point(seconds=n, step=STEPS * n // 3, samples=n, score=1 - each / 100)
        for n, each in enumerate(errors, 1)
    )
    worker = WorkerTime("box", 10.0, 10.0 * waits, 0.0, 0.01)
    return Result(
        contender=name,
        tau=tau,
        rate=0.1,
        seed=seed,
        hosts=p,
        score=points[-1].score,
        points=points,
        workers=(worker,) * p,
    )


def diverged(result: Result) -> Result:
    return replace(result, score=None, diverged="the test loss was 5")


ABOUT: dict[str, Any] = {
    "metric": "val/accuracy",
    "lower_is_better": False,
    "target": 0.8,
    "network": None,
    "titles": {"easgd": "EASGD", "eamsgd": "EAMSGD", "downpour": "DOWNPOUR"},
    "seeds": list(SEEDS),
    "epochs": 2,
    "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
    "versions": {"torch": "2.9.0"},
    "commit": "0996cb7",
    "started": "2026-11-29T15:20:00+00:00",
    "command": "python scripts/reproduce.py",
    "configuration": {
        "classes": 10,
        "model": {"_target_": "lightning_easgd.workloads.models.MLP"},
        "data": {"_target_": "lightning_easgd.workloads.data.FashionMNIST", "batch_size": 128},
    },
}


def study(results: list[Result], workers: int = 4) -> Study:
    return results, ABOUT | {"workers": workers}


Errors = Callable[[str, int], float]
"""Of a method at τ."""


def as_in_the_paper(name: str, tau: int) -> float:
    place = TAUS.index(tau)
    rises = {"eamsgd": -0.5, "easgd": -0.2}
    return {"eamsgd": 10.0, "easgd": 13.0}.get(name, 14.0) + rises.get(name, 3.0) * place


def periods(errors: Errors = as_in_the_paper) -> list[Result]:
    names = ("easgd", "eamsgd", "downpour", "adownpour", "mvadownpour")
    keys = [(name, tau, errors(name, tau)) for name in names for tau in TAUS]
    keys.append(("mdownpour", None, 14.5))
    return [run(name, tau, seed, error) for name, tau, error in keys for seed in SEEDS]


def unstable(results: list[Result]) -> list[Result]:
    """With DOWNPOURs that diverge with one seed at the large periods."""
    return [
        diverged(one)
        if "downpour" in one.contender and one.tau in (16, 64) and one.seed == 43
        else one
        for one in results
    ]


def judged(name: str, *studies: Study) -> Verdict:
    return FINDING[name].judge(Evidence.of(studies))


def test_the_studies_have_all_methods_periods_and_numbers_of_workers() -> None:
    found = reproduce.studies_of(composed())
    size = {
        name: (list(one.contender), list(one.taus), one.workers)
        for name, one in found.items()
        if name != "alone"
    }
    assert size == {
        "periods": (["easgd", "eamsgd", "downpour"], [*TAUS], 4),
        "variants": (["adownpour", "mvadownpour", "mdownpour"], [*TAUS], 4),
        **{f"workers_{p}": (["easgd"], [10], p) for p in WORKERS},
        "communication": (["easgd_blocking"], [1, 10], 4),
    }
    assert (list(found["alone"].contender), found["alone"].workers) == (["sgd", "ddp"], 1)
    full = reproduce.studies_of(composed("scale=full"))
    assert list(full["workers_16"].contender) == ["easgd", "eamsgd"]
    for one in [*found.values(), *full.values()]:
        assert (one.seeds, one.data.sampling, one.schedule) == (3, "whole", "constant")


@pytest.mark.parametrize(
    ("scale", "model", "data"), [("small", "MLP", "FashionMNIST"), ("full", "ConvNet7", "CIFAR10")]
)
def test_every_scale_makes_the_jobs_of_its_studies(
    tmp_path: Path, scale: str, model: str, data: str
) -> None:
    cfg = composed(f"scale={scale}")
    for name, one in reproduce.studies_of(cfg).items():
        comparison = Comparison(one, tmp_path / name)
        for contender in one.contender:
            tau = one.taus[0] if "${tau}" in OmegaConf.to_yaml(one.contender[contender]) else None
            job = Job(contender, tau, 0.5, 42)
            settings = comparison._settings_of(job)
            assert settings["module"]["net"]["_target_"].endswith(f".{model}")
            assert settings["data"]["_target_"].endswith(f".{data}")
            assert settings["module"]["optimizer"]["lr"] == 0.5
    assert list(tmp_path.iterdir()) == []


def test_every_method_is_tuned_alike() -> None:
    assert (composed().rates, list(composed().factors)) == (None, [1])
    cfg = composed("scale=full")
    numbers = {name: len(rates) for name, rates in cfg.rates.items()}
    assert numbers.pop("easgd_blocking") == 1  # only its time counts
    assert set(numbers.values()) == {3}
    assert {*numbers, "easgd_blocking"} == set(cfg.contender)


def test_methods_can_be_chosen() -> None:
    found = reproduce.studies_of(composed("contender=[easgd,sgd]"))
    assert {name: list(one.contender) for name, one in found.items()} == {
        "periods": ["easgd"],
        "alone": ["sgd"],
        **{f"workers_{p}": ["easgd"] for p in WORKERS},
    }
    with pytest.raises(
        ValueError, match="none of those that studies have: easgd, eamsgd, downpour"
    ):
        reproduce.studies_of(composed("contender=[diloco]"))


def test_differences_count_from_two_standard_errors_on() -> None:
    clear = Difference([1.0, 1.2, 1.1])
    assert clear.is_above
    assert str(clear) == "+1.10 ± 0.06"
    assert not Difference([-1.0, -1.2, -1.1]).is_above
    assert not Difference([0.0, 3.0, 0.1]).is_above
    assert not Difference([0.0, 0.0, 0.0]).is_above
    with pytest.raises(NotTested, match="only 2 of 3 seeds"):
        Difference.of({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.0, 2: 2.0})


def test_what_is_as_in_the_paper_is_confirmed() -> None:
    evidence = study(unstable(periods()))
    for name in ("eamsgd_is_best", "margin_grows", "downpour_is_unstable", "larger_periods_help"):
        verdict = judged(name, evidence)
        assert (verdict.outcome, verdict.because) == ("confirmed", "All of the criterion holds.")
        assert len({len(row) for row in verdict.table}) == 1


def flat(name: str, _: int) -> float:
    return {"eamsgd": 12.0, "easgd": 11.0}.get(name, 14.0)


@pytest.mark.parametrize(
    ("name", "because"),
    [
        (
            "eamsgd_is_best",
            "At τ = 1 its error is −1.00 ± 0.00 points below EASGD's; at τ = 1 it is not faster",
        ),
        ("margin_grows", "The margin grows by +0.00 ± 0.00 points."),
        (
            "downpour_is_unstable",
            "DOWNPOUR's error rises by 0.00 points with one seed; DOWNPOUR is",
        ),
        ("larger_periods_help", "It falls by +0.00 ± 0.00 points from τ = 1 to 64."),
    ],
)
def test_what_is_otherwise_is_not_confirmed(name: str, because: str) -> None:
    verdict = judged(name, study(periods(flat)))
    assert verdict.outcome == "not confirmed"
    assert verdict.because.startswith(because)
    assert len(verdict.table) > 4  # numbers are shown all the same


def test_an_improvement_that_nobody_would_notice_is_none() -> None:
    def slightly(name: str, tau: int) -> float:
        return 13 - 0.01 * TAUS.index(tau)

    verdict = judged("larger_periods_help", study(periods(slightly)))
    assert (verdict.outcome, verdict.because) == (
        "not confirmed",
        "It falls by +0.03 ± 0.00 points from τ = 1 to 64.",
    )


def test_a_method_that_is_better_but_not_faster_is_not_the_best() -> None:
    def also(one: Result) -> Result:
        sooner = [replace(one.points[0], score=0.85), *one.points[1:]]
        return replace(one, points=tuple(sooner)) if one.contender == "easgd" else one

    verdict = judged("eamsgd_is_best", study([also(one) for one in periods()]))
    assert verdict.outcome == "not confirmed"
    assert verdict.because.startswith("At τ = 1 it is not faster than EASGD; at τ = 4 it is not")


def test_a_run_that_diverged_guesses() -> None:
    results = [
        diverged(one) if (one.contender, one.tau, one.seed) == ("easgd", 64, 42) else one
        for one in unstable(periods())
    ]
    evidence = Evidence.of([study(results)])
    assert evidence.errors("easgd", 64) == pytest.approx({42: 90.0, 43: 12.5, 44: 12.6})
    assert evidence.largest_jump("easgd", 64) == pytest.approx(90 - 12.4)
    verdict = FINDING["downpour_is_unstable"].judge(evidence)
    assert verdict.because == "EASGD jumps by 77.6 points at τ = 64."
    assert judged("larger_periods_help", study(results)).outcome == "not confirmed"


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("eamsgd_is_best", "DOWNPOUR at τ = 4 with 4 workers has 2 of 3 runs."),
        ("larger_periods_help", "easgd at τ = 1 with 4 workers has 0 of 3 runs."),
        ("more_workers_help", "easgd at τ = 10 with 4 workers has 0 of 3 runs."),
        ("communication_shrinks", "easgd_blocking at τ = 1 with 4 workers has 0 of 3 runs."),
    ],
)
def test_what_lacks_runs_is_not_tested(name: str, because: str) -> None:
    lacks = {"eamsgd_is_best": "downpour", "larger_periods_help": "easgd"}.get(name)
    results = [
        one
        for one in periods()
        if one.contender != lacks or (lacks == "downpour" and (one.tau, one.seed) != (4, 43))
    ]
    assert judged(name, study(results)) == Verdict("not tested", because)


def test_failed_runs_do_not_count() -> None:
    results = [
        Result.of(one.job, {}, 1.0, error="no luck") if one.seed == 44 else one for one in periods()
    ]
    verdict = judged("margin_grows", study(results))
    assert verdict.outcome == "not tested"


def workers(falls: Mapping[int, float]) -> list[Study]:
    return [
        study([run(n, 10, s, 12 - fall, p=p) for n in ("easgd", "eamsgd") for s in SEEDS], p)
        for p, fall in falls.items()
    ]


def test_more_workers_help_only_where_the_best_test_falls() -> None:
    assert judged("more_workers_help", *workers({4: 0, 8: 0.3, 16: 0.7})).outcome == "confirmed"
    verdict = judged("more_workers_help", *workers({4: 0, 8: -0.1, 16: -0.2}))
    assert verdict.outcome == "not confirmed"
    assert "EASGD's falls by −0.20 ± 0.00 points from p = 4 to 16" in verdict.because
    assert "EAMSGD's is higher at p = 8 than at 4" in verdict.because


@pytest.mark.parametrize(
    ("rarely", "outcome"), [(0.02, "confirmed"), (0.1, "not confirmed"), (0.2, "not confirmed")]
)
def test_communication_shrinks_by_its_share_of_the_time(rarely: float, outcome: str) -> None:
    shares = {1: 0.2, 10: rarely}
    results = [
        run("easgd_blocking", tau, seed, 10.0, waits=share)
        for tau, share in shares.items()
        for seed in SEEDS
    ]
    assert judged("communication_shrinks", study(results)).outcome == outcome


def test_the_stability_of_admm_is_calculated() -> None:
    verdict = judged("admm_is_less_stable", study(periods()))
    assert verdict.outcome == "confirmed"
    assert verdict.table[1] == ["3", "ADMM, formula", verdict.table[1][2], "1.000974"]


def test_the_page_says_of_all_findings_what_became_of_them(tmp_path: Path) -> None:
    told = write_page([study(unstable(periods())), *workers({4: 0, 8: -1, 16: 1})], tmp_path)
    outcomes = [verdict.outcome for _, verdict in told]
    assert outcomes == [*["confirmed"] * 4, "not confirmed", "not tested", "confirmed"]
    text, html = ((tmp_path / f"findings.{kind}").read_text() for kind in ("md", "html"))
    assert "5 are **confirmed**, 1 is **not confirmed**, 1 is **not tested**.\n" in text
    for number, (finding, verdict) in enumerate(told, 1):
        assert f"\n## {number}. {finding.title}: {verdict.outcome}\n" in text
        assert f"| {number}. {finding.title} | **{verdict.outcome}** |\n" in text
        for said in (finding.paper, finding.criterion, verdict.because):
            assert said in text
    figures = sorted(path.name for path in (tmp_path / "findings").iterdir())
    names = ("error_over_steps", "error_over_tau", "error_over_workers", "stability")
    assert figures == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    for name in names:
        assert text.count(f"(findings/{name}.svg)") == html.count(f'src="findings/{name}.svg"') == 1
    assert html.count("<table>") == 2 + 6
    assert "](" not in html


def test_nothing_stored_is_an_error_and_not_a_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no result"):
        write_page([], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("scale=huge", "Available options in 'scale':\n\tfull\n\tsmall"),
        ("seeds=0", "seeds=0 is not allowed. Allowed: a whole number of seeds, at least 1"),
        ("train=false", "There is no result. Train something, or name a folder that has some."),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path,
    argument: str,
    message: str,
) -> None:
    with pytest.raises((ValueError, HydraException), match=message):
        reproduce.reproduce(composed(argument), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "contender=[misspelt]"])
    with pytest.raises(SystemExit, match="contender got misspelt; allowed are adownpour, "):
        reproduce.command_line()


def test_stored_results_are_judged_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["contender=[easgd]", "seeds=3", "rates={easgd:[0.1]}"]
    one = reproduce.studies_of(composed(*arguments))["periods"]
    folder = tmp_path / "periods"
    folder.mkdir()
    comparison, store = Comparison(one, folder), Store(folder)
    for result in periods():
        if result.contender == "easgd":
            store.add(replace(result, settings=comparison._settings_of(result.job)))
    store.describe(comparison._about())
    kept = shutil.copy(folder / "results.jsonl", tmp_path / "kept")
    assert reproduce.reproduce(composed(*arguments, "train=false"), tmp_path)
    told = capsys.readouterr().out
    assert "study 1 of 1: periods" in told
    assert "\nconfirmed: A larger τ improves EASGD's test error. All of the" in told
    assert told.count("\nnot tested: ") == 5
    assert (tmp_path / "findings.html").exists()
    assert (folder / "results.jsonl").read_text() == Path(kept).read_text()
    assert json.loads((folder / "about.json").read_text())["workers"] == 4
