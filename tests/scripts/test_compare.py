"""scripts/compare.py: its configuration, what it refuses, and a small comparison that goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import emulation
import pytest
from comparing import center
from comparing.clusters import rank_on_cluster
from comparing.comparison import Comparison
from comparing.contender import moving_average
from comparing.result import Point, WorkerTime
from comparing.running import sharing_gpu
from comparing.work import gathered
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from processes import end_by, forked_until_written, free_port, processes_of, run_script, run_workers

from lightning_easgd import EASGDStrategy

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
SCRIPT = ROOT / "scripts" / "compare.py"
NAMES = sorted(
    path.stem
    for path in (CONF / "contender").glob("*.yaml")
    if "speed_only" not in path.read_text()
)
DOWNPOURS = ["downpour", "adownpour", "mvadownpour"]
MANY = ["ddp", "ddp_bf16", "local_sgd", "easgd", "eamsgd", *DOWNPOURS]
SMALL = [
    *("model=mlp", "model.hidden=[16]", "workers=2", "epochs=2", "seeds=1", "taus=[2,16]"),
    *("factors=[1]", "points=3", "train_loss=true"),
]


REASON = emulation.unavailable()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@cache  # no test changes what it gets
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("compare", overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_has_a_title_an_optimizer_and_a_strategy(name: str) -> None:
    cfg = composed(f"contender=[{','.join(NAMES)}]", "tau=8").contender
    assert list(cfg) == NAMES
    assert cfg[name].title
    assert isinstance(instantiate(cfg[name].optimizer), partial)
    strategy = instantiate(cfg[name].strategy)
    assert isinstance(strategy, Strategy)
    if isinstance(strategy, EASGDStrategy) and name != "easgd_auto":
        assert str(strategy.options.rules.period) == str(cfg[name].period)
        assert cfg[name].period == {"delayed_sgd_often_int8": 4, "mdownpour": 1}.get(name, 8)


@pytest.mark.parametrize("name", ["easgd", "eamsgd", "downpour"])
def test_asynchronous_contenders_differ_by_where_the_center_is_alone(name: str) -> None:
    pair = composed(f"contender=[{name},{name}_async]", "tau=8").contender
    one, other = (OmegaConf.to_container(pair[each], resolve=True) for each in pair)
    assert (one["optimizer"], one["period"]) == (other["optimizer"], other["period"])
    strategies = [instantiate(each["strategy"]) for each in (one, other)]
    assert [strategy.solo for strategy in strategies] == [False, True]
    lines = [
        [line for line in strategy.options.lines() if not line.startswith("center=")]
        for strategy in strategies
    ]
    assert lines[0] == lines[1]
    assert strategies[1].options.center.is_local


def test_of_a_worker_that_was_done_before_a_test_its_last_point_counts() -> None:
    def worker(*samples: int) -> dict[str, Any]:
        points = [asdict(Point(1.0 * n, n, n, 10.0 * n)) for n in samples]
        time = asdict(WorkerTime("host", 1.0))
        return {"points": points, "time": time, "sent_bytes": 1.0, "ddp_bytes": 2.0, "steps": 3}

    found = gathered([worker(1, 2, 3) | {"score": 0.5}, worker(2, 4)])
    assert [point.samples for point in found["points"]] == [3, 6, 7]
    assert [point.sent_bytes for point in found["points"]] == [15, 30, 35]
    assert gathered([worker() | {"diverged": "so"}, worker()])["points"] == ()


def test_data_bring_their_length_and_their_target() -> None:
    cfg = composed()
    assert list(cfg.contender) == ["ddp", "easgd", "eamsgd", "downpour"]
    assert (cfg.taus, cfg.seeds, cfg.workers, cfg.target, cfg.network) == ([16], 2, 4, 0.95, None)
    assert (composed("data=fashion_mnist").target, composed("data=cifar10").target) == (0.88, None)
    text = composed("data=text")
    assert (text.metric, text.lower_is_better, text.classes) == ("val/bits_per_byte", True, 256)
    assert (text.optimizer.lr, text.model.context) == (0.002, 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=0", "seeds=0 is not allowed. Allowed: a whole number of seeds, at least 1"),
        ("workers=two", "workers='two' is not allowed"),
        ("epochs=1.5", "epochs=1.5 is not allowed"),
        ("taus=[4,0]", r"taus\[1\]=0 is not allowed"),
        ("taus=[]", "taus, contender and factors got nothing"),
        ("factors=[0]", "factors got 0; allowed are numbers above 0"),
        ("tuning_epochs=0", "tuning_epochs=0 is not allowed"),
        ("network=fast", "network got 'fast'"),
        ("contender=[limit]", "nobody exchanges anything: compare its speed"),
        ("tuning_seeds=0", "tuning_seeds=0 is not allowed"),
        ("parallel=0", "parallel=0 is not allowed"),
        ("rates=[0.1,-1]", "rates got -1; allowed are numbers above 0"),
        ("rates={easgd:[0]}", "rates got 0; allowed are numbers above 0"),
        ("rates={sgd:[0.1]}", "rates got sgd; allowed are ddp, easgd, eamsgd, downpour"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(composed(override), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_contenders_may_try_rates_of_their_own(tmp_path: Path) -> None:
    plan = Comparison(composed("rates={easgd:[0.3,0.7]}", "contender=[ddp,easgd]"), tmp_path)._plan
    assert plan.rates == {"ddp": [0.025, 0.05, 0.1], "easgd": [0.3, 0.7]}


def test_workers_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [sharing_gpu(rank, 2) for rank in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0", "1", "0"]
    assert {each["LOCAL_RANK"] for each in found} == {"0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert sharing_gpu(1, 2)["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_moving_average_remembers_as_many_steps_at_every_period() -> None:
    assert moving_average(100, 1).rate == pytest.approx(0.01)
    for tau in (4, 16, 64):
        assert (1 - moving_average(100, tau).rate) ** (1 / tau) == pytest.approx(0.99)


def run(folder: Path, *overrides: str, code: int = 0) -> str:
    arguments = [f"hydra.run.dir={folder}", *SMALL, *overrides]
    return run_script(SCRIPT, arguments, folder=folder, workers=None, code=code)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report is drawn, as where the extra ``scripts`` is not installed; it takes 2 s."""
    monkeypatch.setitem(sys.modules, "presenting.page", None)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def is_tested_on_the_way(one: dict[str, Any], *, easgd: bool) -> None:
    points = one["points"]
    assert [point["step"] for point in points] == [11, 22, 33, 44]
    assert [point["samples"] for point in points] == [2 * 32 * point["step"] for point in points]
    for key in ("seconds", "sent_bytes"):
        values = [point[key] for point in points]
        assert values == sorted(set(values))
        assert values[-1] == one[key]
    assert points[-1]["score"] == one["score"] > points[0]["score"]
    assert all((point["distance"] is not None) == easgd for point in points)
    for worker in one["workers"]:
        assert worker["host"]
        assert (worker["waited"] is not None) == easgd
        assert 0 <= (worker["waited"] or 0) <= worker["seconds"] < one["job_seconds"]


def test_a_small_comparison_and_going_on_with_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    faster = [f"contender.{name}.optimizer.lr=0.1" for name in DOWNPOURS]  # than on long runs
    large = "data.batch_size=32"
    told = run(tmp_path, large, "taus=[2]", *faster, f"contender=[{','.join(MANY)}]", "target=0.4")
    found = results(tmp_path)
    assert [(one["contender"], one["tau"]) for one in found] == [
        (name, None if name.startswith("ddp") else 2) for name in MANY
    ]
    assert told.count(" left] ") == len(MANY) - 1
    assert all(one["score"] > 0.3 and one["loss"] < 2.3 for one in found)
    for one in found:
        is_tested_on_the_way(one, easgd=not one["contender"].startswith("ddp"))
    shares = {one["contender"]: one["sent_bytes"] / one["ddp_bytes"] for one in found}
    assert (shares["ddp"], shares["ddp_bf16"]) == (1, 0.5)
    assert shares["easgd"] == pytest.approx(0.5, rel=0.1)
    about = json.loads((tmp_path / "about.json").read_text())
    assert (about["target"], about["baseline"], about["workers"]) == (0.4, "ddp", 2)
    assert about["machine"]["cores"] == os.cpu_count()
    assert "diverged" not in told
    assert not (tmp_path / "figures" / "score_over_period.svg").exists()
    page = (tmp_path / "report.html").read_text()
    assert all(title in page for title in about["titles"].values())
    assert (tmp_path / "figures" / "error_over_time.svg").exists()

    # Two more periods of two contenders, and what diverges: to NaN, under DDP too, and to worse.
    wild = "contender.downpour.optimizer.lr"
    chosen = ["contender=[ddp,downpour]", "contender.ddp.optimizer.lr=1e30"]
    told = run(tmp_path, large, *chosen, f"{wild}=1e30", "taus=[2,16]")
    more = results(tmp_path)[len(found) :]
    assert [(one["contender"], one["tau"]) for one in more] == [
        *(("ddp", None), ("downpour", 2), ("downpour", 16))
    ]
    assert "the training loss was nan" in more[0]["diverged"]
    assert "the weights of every worker were NaN" in more[1]["diverged"]
    assert all(one["score"] is None for one in more)
    assert told.count("1, 1 diverged") == 3
    assert (tmp_path / "figures" / "score_over_period.png").read_bytes().startswith(b"\x89PNG")

    # Another seed of a contender: what is known is not trained again, and seeds differ.
    request.getfixturevalue("no_page")
    told = run(tmp_path, large, "contender=[easgd]", "seeds=2", "taus=[2]")
    assert 'no report.html, for presenting.page is missing: pip install -e ".[scripts]"' in told
    (other,) = results(tmp_path)[len(found) + len(more) :]
    (first,) = (one for one in found if one["contender"] == "easgd")
    assert (first["seed"], other["seed"]) == (42, 43)
    assert first["loss"] != other["loss"]
    assert processes_of(tmp_path) == {}


def test_a_signal_leaves_results_and_no_process(tmp_path: Path) -> None:
    options = [f"hydra.run.dir={tmp_path}", *SMALL, "seeds=100"]
    with forked_until_written(tmp_path / "results.jsonl", SCRIPT, options) as script_alone:
        assert end_by(signal.SIGTERM, script_alone)[0] == 128 + signal.SIGTERM
    assert processes_of(tmp_path) == {}
    assert results(tmp_path)


LATE = """
import time

import lightning.pytorch as pl
from lightning_easgd.exchange import center_link


class Late(pl.Callback):
    def setup(self, *_, stage):
        center_link._PAUSE = 2.0  # until who has finished asks whether the other one has

    def on_train_batch_end(self, trainer, *_):
        time.sleep(0.02 if trainer.is_global_zero else 0)
"""


@needs_hosts
@pytest.mark.usefixtures("nothing_left", "no_page")
def test_on_an_emulated_network_one_that_fails_loses_nothing_of_the_others(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
    (tmp_path / "late.py").write_text(LATE)
    chosen = ["contender=[easgd,ddp,easgd_async]", "+contender.easgd.strategy.alpha=-1", "taus=[2]"]
    late = ["+contender.easgd_async.callback._target_=late.Late", "job_timeout=60"]
    told = run(tmp_path, *chosen, *late, "network=100mbit", "epochs=1", code=1)
    failed, ddp, apart = results(tmp_path)
    # Worker 1 asks once more when worker 0, which has the server, has long finished.
    assert apart["error"] is None
    assert failed["contender"] == "easgd"
    assert "alpha" in failed["error"]
    assert "error: easgd was left out" in told
    assert (ddp["network"], ddp["hosts"], ddp["tuning"]) == ("100mbit", 2, False)
    assert 0 < ddp["link_rate"] < 120e6
    assert [worker["host"] for worker in ddp["workers"]] == ["host0", "host1"]
    assert len(ddp["points"]) == 4
    assert ddp["sent_bytes"] == ddp["ddp_bytes"]
    # Each has the other's samples of the moment, and the sample of what is delivered is the whole.
    steps, samples = zip(*((p["step"], p["samples"]) for p in apart["points"]), strict=True)
    assert (steps, samples[-1]) == ((11, 22, 33, 44), 2 * 16 * 44)
    assert sorted(set(samples)) == list(samples)
    # A difference and a center every second step, in place of gradients of twice that at each.
    assert apart["sent_bytes"] / apart["ddp_bytes"] == pytest.approx(1.0, rel=0.1)


def serve_what_is_none(_: int) -> None:
    center._serve({"algorithm": "none"})


def test_a_server_that_does_not_start_is_not_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
    (outcome,) = run_workers(serve_what_is_none, workers=1, check=False)
    assert outcome.error == "ExchangeError"
    assert "did not start" in outcome.message
    assert "'none'" in capfd.readouterr().err


OWN = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Lit(pl.LightningModule):
    def __init__(self, width=1):
        super().__init__()
        self.net = torch.nn.Linear(4, width)

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val/mine", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _loader(self):
        return DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=2)

    train_dataloader = val_dataloader = _loader
"""


def test_a_module_of_ones_own_is_compared_by_the_number_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = ["module._target_=mine.Lit", "module.width=3", "data=none", "workers=2", "epochs=1"]
    chosen = ["contender=[easgd]", "seeds=1", "points=1", "lower_is_better=true"]
    arguments = [f"hydra.run.dir={tmp_path}", *own, *chosen]
    run_script(SCRIPT, [*arguments, "metric=val/mine"], folder=tmp_path, workers=None)
    (one,) = results(tmp_path)
    assert one["rate"] is None
    first, last = one["points"]
    assert (first["step"], last["step"], last["samples"]) == (2, 4, 16)
    assert last["score"] < first["score"]
    told = run_script(SCRIPT, [*arguments, "metric=x"], folder=tmp_path, workers=None, code=1)
    assert "metric got 'x'; allowed is what validation logs: val/mine." in told


def test_an_unknown_contender_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    told = run(tmp_path, "contender=[dpp]", code=1)
    assert "error: contender got dpp; allowed are adownpour, ddp, " in told


def test_under_torchrun_the_first_worker_keeps_what_all_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    small = [*SMALL, "taus=[2]", "contender=[easgd,ddp]", "epochs=1"]
    for seeds in (1, 2):
        arguments = [f"hydra.run.dir={tmp_path}", *small, f"seeds={seeds}", f"port={free_port()}"]
        with monkeypatch.context() as patched:
            if seeds == 1:  # as no_page: one page will do
                patched.setitem(sys.modules, "presenting.page", None)
            run_script(SCRIPT, arguments, folder=tmp_path, workers=2)
    assert (tmp_path / "report.html").exists()
    found = results(tmp_path)
    assert [(one["contender"], one["seed"]) for one in found] == [
        *(("easgd", 42), ("ddp", 42), ("easgd", 43), ("ddp", 43))
    ]
    for one in found:
        assert (one["network"], one["hosts"], len(one["workers"])) == ("cluster", 2, 2)
        assert one["points"][-1]["samples"] == 2 * 16 * one["steps"]
        assert one["link_rate"] > 0
    assert json.loads((tmp_path / "about.json").read_text())["titles"]["ddp"] == "DDP"


def test_a_task_of_slurm_finds_the_others_as_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "host[0-1]"}
    monkeypatch.setattr(os, "environ", task | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    assert rank_on_cluster() == 3
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "2", "host0"]
