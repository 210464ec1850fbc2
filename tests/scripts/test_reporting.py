"""scripts/report.py on stored runs, against what is computed here by hand."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report
from matplotlib.colors import to_rgb
from omegaconf import OmegaConf
from reporting import heat_map, pareto
from reporting.runs import Run, find, notes
from reporting.settings import Metric, choose, choose_metric, front, group

from lightning_easgd.algorithms import EASGD
from lightning_easgd.workloads.report import Report

ACCURACY = Metric("test/accuracy", "max", is_share=True)
Store = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Stores a run as train.py does."""

    def write(name: str, overrides: list[str], *, accuracy: float | None, **more: Any) -> Path:
        folder = tmp_path / "sweep" / name
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
        values = dict(each.split("=") for each in overrides)
        tau, beta = int(values.get("tau", 1)), float(values.get("beta", 0.9))
        strategy = {"tau": tau, "beta": beta, "groups": None, "compression": None}
        OmegaConf.save(OmegaConf.create({"strategy": strategy}), folder / "config.yaml")
        job = {"error": more.pop("error", None), "seconds": 1.5}
        (folder / "job.json").write_text(json.dumps(job))
        if accuracy is not None:
            pulls = {"strength": f"beta={beta}", "rule": repr(EASGD()), "tau": tau}
            told = {"strategy": "easgd", "workers": 4, "learning_rate": 0.1, **pulls}
            cost = {"bytes_sent": 32_000_000 // tau, "ddp_bytes_sent": 32_000_000}
            tested = {"test/loss": 2 - accuracy, "test/accuracy": accuracy}
            written = Report(**(told | cost | {"tested": tested} | more))
            (folder / "report.json").write_text(written.to_json())
        return folder

    return write


REACHED = {
    (1, 0.9): (0.970, 0.974, 0.972),
    (4, 0.9): (0.971, 0.977, 0.974),
    (16, 0.9): (0.974, 0.971, 0.973),
    (64, 0.9): (0.80, 0.81, 0.82),
    (1, 0.3): (0.96, 0.961, 0.962),
    (4, 0.3): (0.969, 0.968, 0.967),
    (16, 0.3): (0.95, 0.96, math.nan),
}


@pytest.fixture
def sweep(store: Store) -> Path:
    """Two strengths by four periods by three seeds, of which some are missing."""
    number = 0
    for (tau, beta), accuracies in REACHED.items():
        for seed, accuracy in enumerate(accuracies, 1):
            store(str(number), [f"tau={tau}", f"beta={beta}", f"seed={seed}"], accuracy=accuracy)
            number += 1
    refused = ["tau=1", "beta=1.7", "seed=1"]
    return store(str(number), refused, accuracy=None, error="beta=1.7 diverges").parent


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()


def test_the_setting_with_the_fewest_bytes_within_one_standard_error_is_recommended(
    sweep: Path,
) -> None:
    settings = group(find([sweep]), ACCURACY)
    choice = choose(settings, ACCURACY)
    assert choice is not None
    assert dict(choice.best.values) == {"tau": "4", "beta": "0.9"}
    assert choice.best.mean == pytest.approx(97.4)
    assert choice.best.error == pytest.approx(0.3 / math.sqrt(3))
    assert dict(choice.setting.values) == {"tau": "16", "beta": "0.9"}  # 97.27 > 97.4 - 0.17
    assert choice.setting.megabytes == 2.0
    assert "tau=16 beta=0.9\n  test/accuracy in % 97.27 ± 0.09 (3 run(s)), 2 MB sent" in choice.text
    assert "The best is tau=4 beta=0.9: 97.40 ± 0.17 (3 run(s)), 8 MB sent." in choice.text
    best = [(s.values["tau"], s.values["beta"]) for s in front(settings, ACCURACY)]
    assert best == [("64", "0.9"), ("16", "0.9"), ("4", "0.9")]


def test_a_setting_that_lost_a_run_is_not_recommended(store: Store) -> None:
    store("0", ["tau=1", "seed=1"], accuracy=0.9)
    store("1", ["tau=1", "seed=2"], accuracy=0.91)
    store("2", ["tau=4", "seed=1"], accuracy=0.99)
    store("3", ["tau=4", "seed=2"], accuracy=math.nan)
    folder = store("4", ["tau=16", "seed=1"], accuracy=None, error="out of memory").parent
    settings = group(find([folder]), ACCURACY)
    choice = choose(settings, ACCURACY)
    assert choice is not None
    assert dict(choice.setting.values) == {"tau": "1"}
    assert choose(settings[1:], ACCURACY) is None
    assert front(settings, ACCURACY) == settings[:1]
    (axes,) = pareto.draw(settings, ACCURACY, None).axes
    assert "one that lost a run: mean of those that are left" in axes.get_legend_handles_labels()[1]


def test_alike_numbers_and_none_are_drawn(store: Store) -> None:
    alike = [store(f"a/{tau}", [f"tau={tau}"], accuracy=0.9) for tau in (1, 2)]
    failed = [store(f"b/{tau}", [f"tau={tau}"], accuracy=None, error="none") for tau in (1, 2)]
    for folders, shown in ((alike, "90.00"), (failed, "no result")):
        settings = group(find([folders[0].parent]), ACCURACY)
        figure = heat_map.draw(heat_map.panels(settings), ACCURACY)
        figure.savefig(folders[0] / "picture.png")
        assert {text.get_text() for text in figure.axes[0].texts} == {shown}


def test_of_single_runs_the_best_is_taken_and_the_spread_is_said_to_be_unknown(
    store: Store,
) -> None:
    store("0", ["tau=1"], accuracy=0.9)
    folder = store("1", ["tau=4"], accuracy=0.8999).parent
    choice = choose(group(find([folder]), ACCURACY), ACCURACY)
    assert choice is not None
    assert dict(choice.setting.values) == {"tau": "1"}
    assert "No setting has two runs, so the spread is not known" in choice.text


def test_all_is_written_and_what_is_missing_is_said(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, sweep)
    printed = capsys.readouterr().out
    assert "job  tau  beta  seed" in printed
    assert "  21 [tau=1 beta=1.7 seed=1]: beta=1.7 diverges" in printed
    for cell in ("τ=64 β=0.3", "τ=4 β=1.7", "τ=16 β=1.7", "τ=64 β=1.7"):
        assert f"  no run: {cell}\n" in printed
    assert "no run: τ=1 β" not in printed
    out = sweep / "report"
    for name in ("bytes", "tau_beta"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / f"{name}.svg").read_text()
    chosen = json.loads((out / "recommended.json").read_text())
    assert chosen["setting"] == {"tau": "16", "beta": "0.9"}
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == [str(number) for number in range(22)]
    assert (rows[2]["test/accuracy"], rows[2]["MB sent"]) == ("0.972", "32.0")
    typed(monkeypatch, sweep, "--metric", "test/loss")  # its own pictures are no runs
    assert "by the rule" in capsys.readouterr().out


def test_the_heat_map_has_the_border_of_stability_and_numbers_that_can_be_read(
    sweep: Path,
) -> None:
    settings = group(find([sweep]), ACCURACY)
    (panel,) = heat_map.panels(settings)
    assert panel.taus == [1, 4, 16, 64]
    assert panel.betas == [0.3, 0.9, 1.7]
    assert panel.border == pytest.approx(2 * 4 / 5)
    figure = heat_map.draw([panel], ACCURACY)
    axes, bar = figure.axes
    assert axes.get_xscale() == "log"
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5]  # between 0.9 and 1.7
    assert [line.get_label() for line in axes.lines] == [
        "border of stability, β = 2p/(p + 1) = 1.6"
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.3", "0.9", "1.7"]
    assert bar.get_ylabel() == "test/accuracy in %, mean of seeds"
    texts = {text.get_text(): to_rgb(text.get_color()) for text in axes.texts}
    assert {"97.20", "97.40", "95.50\n2 of 3", "no result", "no run"} <= set(texts)
    mesh = axes.collections[0]
    shades = [sum(mesh.cmap(mesh.norm(value))[:3]) for value in (96.0, 96.8, 97.27, 97.4)]
    assert shades == sorted(shades)  # brighter is better, in grey too
    assert mesh.norm.vmin > 90  # one that diverged has no say in the colours


def test_a_border_is_drawn_only_where_it_is_known(store: Store) -> None:
    store("momentum", ["tau=1"], accuracy=0.9, rule=repr(EASGD(center_momentum=0.5)))
    for key, value in (("compression", "topk"), ("groups", 2)):
        path = store(key, ["tau=1"], accuracy=0.9) / "config.yaml"
        stored = OmegaConf.load(path)
        stored.strategy[key] = value
        OmegaConf.save(stored, path)
    plain = store("plain", ["tau=1"], accuracy=0.9)
    borders = {run.folder.name: run.border for run in find([plain.parent])}
    assert borders == {"momentum": None, "compression": None, "groups": None, "plain": 1.6}


@pytest.mark.parametrize(
    ("strength", "beta"),
    [("beta=0.5", 0.5), ("alpha=0.1", 0.4), ("rho=2.0", 0.8), ("beta=Linear(0.1, 0.9)", None)],
)
def test_beta_follows_from_what_was_set(store: Store, strength: str, beta: float | None) -> None:
    (run,) = find([store("0", [], accuracy=0.9, strength=strength)])
    assert run.beta == (beta if beta is None else pytest.approx(beta))


def test_what_one_pays_for_in_bytes_is_on_a_logarithmic_axis(sweep: Path) -> None:
    settings = group(find([sweep]), ACCURACY)
    figure = pareto.draw(settings, ACCURACY, settings[2])
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "MB sent by worker 0 in a run (logarithmic)"
    legends = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert legends[1] == ["1  τ=16 β=0.9", "2  τ=4 β=0.9"]
    assert "far outside: 81.00" in legends[0]


def test_reports_of_another_version_or_damaged_ones_are_left_out(
    store: Store, tmp_path: Path
) -> None:
    store("0", ["tau=1"], accuracy=0.9)
    old = store("1", ["tau=4"], accuracy=0.9) / "report.json"
    content = json.loads(old.read_text())
    old.write_text(json.dumps({k: v for k, v in content.items() if k not in ("rule", "tested")}))
    (store("2", ["tau=16"], accuracy=0.9) / "report.json").write_text('{"tau": ')
    store("3", ["tau=64"], accuracy=None)
    other = {"data": "Other", "versions": {"torch": "1.0"}, "bytes_sent": None}
    store("4", ["tau=128"], accuracy=0.9, **other)
    store("5", ["tau=256"], accuracy=0.9, pruned=True)
    runs = find([tmp_path / "sweep"])
    assert list(notes(runs)) == [
        "1 [tau=4]: report.json is of another version: it lacks rule, tested",
        "2 [tau=16]: report.json cannot be read",
        "3 [tau=64]: no report.json, for the run has not ended",
        "4: its bytes were not counted, so it is neither drawn nor recommended",
        "5 [tau=256]: the search ended it early",
        "The runs differ in data: , Other.",
        "The runs are of 2 sets of versions; see their report.json.",
    ]


def test_runs_of_several_folders_are_told_apart(store: Store, tmp_path: Path) -> None:
    folders = [store(name, ["tau=1"], accuracy=0.9) for name in ("a/10", "a/9", "b/0")]
    assert [run.name for run in find([tmp_path])] == ["a/9", "a/10", "b/0"]
    assert [run.name for run in find([folders[2], folders[2].parent])] == ["0"]


def test_metrics_are_found_and_refused(store: Store) -> None:
    runs = find([store("0", [], accuracy=0.9, logged={"val/loss": 0.5})])
    assert choose_metric(runs, None, None) == ACCURACY
    assert choose_metric(runs, "val/loss", None) == Metric("val/loss", "min")
    assert choose_metric(runs, "val/loss", "max").better == "max"
    in_percent = find([store("1", [], accuracy=90.0)])
    assert choose_metric(in_percent, None, None) == Metric("test/accuracy", "max")
    with pytest.raises(ValueError, match=r"--metric f1: .* Allowed are test/accuracy, test/loss"):
        choose_metric(runs, "f1", None)
    nothing = Run(name="0", folder=Path(), overrides=(), report={}, problem="stopped", seconds=None)
    with pytest.raises(ValueError, match="No run has a number"):
        choose_metric([nothing], None, None)


@pytest.mark.parametrize(("name", "said"), [("none", "is no folder"), ("empty", "has no run")])
def test_a_folder_without_runs_is_refused_in_a_line(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=said):
        typed(monkeypatch, tmp_path / name)
