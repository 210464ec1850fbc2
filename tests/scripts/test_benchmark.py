"""scripts/benchmark.py: its configuration, what it refuses, and small runs of all contenders."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import emulation
import pytest
from comparing.contender import contenders_of
from comparing.networks import Setting, rate_of
from comparing.result import Job
from comparing.speed import Benchmark, settings_for
from comparing.speed_plan import settings_of
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from processes import end_by, forked_until_written, free_port, processes_of, run_script

ROOT = Path(__file__).parents[2]
CONF, SCRIPT = ROOT / "conf", ROOT / "scripts" / "benchmark.py"
NAMES = list(OmegaConf.load(CONF / "benchmark.yaml").defaults[6].contender)
PEERS = [name for name in NAMES if name.startswith("torchft")]
PLAIN = [name for name in NAMES if name not in [*PEERS, "post_local_sgd"]]
REASON = emulation.unavailable()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_peers = pytest.mark.skipif(
    importlib.util.find_spec("torchft") is None, reason='pip install -e ".[peers]"'
)
SMALL = ["data=digits", "tau=4", "steps=16", "hosts=2", "network=unlimited", "repetitions=1"]


@cache  # no test changes what it gets
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("benchmark", overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_is_a_strategy_and_perhaps_a_callback(name: str) -> None:
    if name in PEERS:
        pytest.importorskip("torchft", reason='pip install -e ".[peers]"')
    configs = OmegaConf.to_container(composed("tau=8").contender[name], resolve=True)
    (contender,) = contenders_of({name: configs}).values()
    assert contender.period in (None, 1, 8)
    strategy, callbacks = contender.make()
    assert isinstance(strategy, Strategy)
    assert all(isinstance(callback, Callback) for callback in callbacks)


def test_by_default_all_contenders_take_part_in_all_sweeps_but_jitter() -> None:
    for sweep in ("none", "bandwidth", "workers"):
        assert list(composed(f"sweep={sweep}").contender) == NAMES
    assert set(composed("sweep=jitter").contender) >= {"limit", "easgd", "easgd_blocking"}
    assert list(composed("sweep=jitter", "contender=[ddp]").contender) == ["ddp"]


def settings(*overrides: str) -> list[Setting]:
    cfg = composed(*overrides)
    asked = Setting(cfg.network, cfg.hosts, cfg.stall, cfg.slow)
    return settings_of(asked, cfg.sweep.over, cfg.sweep["values"])


def test_sweeps() -> None:
    networks = [setting.network for setting in settings("sweep=bandwidth")]
    rates = [rate_of(network) or float("inf") for network in networks]
    assert rates == sorted(rates)
    assert {"10mbit", "20mbit", "100mbit", "1gbit", "unlimited"} <= set(networks)
    assert [setting.hosts for setting in settings("sweep=workers")] == [2, 4, 8, 16]
    assert settings("sweep=jitter") == [Setting("1gbit", 4, 0.5)]
    assert settings("sweep=straggler") == [Setting("1gbit", 4, slow=slow) for slow in (1, 4)]
    assert str(settings("sweep=straggler")[1]) == "1gbit, 4 hosts, worker 3 4 x slower"


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [([], 1e-6), (["speed_lr=null"], 0.05), (["speed_lr=0.01"], 0.01)],
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_weights_stay_where_only_speed_is_measured(
    overrides: list[str], lr: float, optimizer: str
) -> None:
    cfg = composed(f"optimizer={optimizer}", "optimizer.lr=0.05", *overrides)
    settings = settings_for(cfg, Job("easgd", 16, None, 42))
    module = instantiate(OmegaConf.create(settings["module"]))
    assert module.configure_optimizers().param_groups[0]["lr"] == lr


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network=fast", "network got 'fast'"),
        ("hosts=1", "hosts=1 is not allowed. Allowed: a whole number of hosts, at least 2"),
        ("repetitions=0", "repetitions=0 is not allowed"),
        ("steps=20", "steps got 20; allowed are multiples of tau=16"),
        ("tau=0", "tau=0 is not allowed"),
        ("minutes=soon", "minutes got 'soon'"),
        ("slow=0.5", "slow got 0.5; allowed is a number from 1 on"),
        ("pace=-1", "pace got -1; allowed are seconds from 0 on"),
        ("speed_lr=0", "speed_lr got 0; allowed are null and a number above 0"),
        ("accelerator=tpu", "accelerator got 'tpu'; allowed are cpu and gpu"),
        ("accelerator=gpu", "emulated hosts would share one.* torchrun"),
        ("baselines=[colour]", "allowed are the contenders: limit, "),
        ("sweep.over=colour", "sweep.over got 'colour'"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Benchmark(composed(override), tmp_path, by_name=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_cluster")
def test_without_root_it_says_what_else_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation.shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match=r"Hosts cannot be emulated: only root .* torchrun"):
        Benchmark(composed(), tmp_path, by_name=False)


def test_a_cluster_has_the_network_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="On a cluster network and hosts are what they are"):
        Benchmark(composed("sweep=bandwidth"), tmp_path, by_name=False)


def run(folder: Path, *overrides: str, code: int = 0) -> str:
    arguments = [f"hydra.run.dir={folder}", *SMALL, *overrides]
    return run_script(SCRIPT, arguments, folder=folder, workers=None, code=code)


def results(folder: Path, name: str = "results") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def by_contender(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["contender"]: one.get("speed") or one for one in found}


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_contender_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    told = run(tmp_path, "contender=[dpp]", code=1)
    assert "error: contender got dpp; allowed are adownpour, " in told


@needs_hosts
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("nothing_left")
def test_all_contenders_on_two_hosts_and_going_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
    names = [*PLAIN, "easgd_async"]
    chosen, length = f"contender=[{','.join(names)}]", "steps=32"
    told = run(tmp_path, chosen, length)
    found = by_contender(results(tmp_path))
    assert list(found) == [one["contender"] for one in results(tmp_path, "summary")] == names
    assert all(f": {name}, seed 42: " in told for name in names)
    for name, one in found.items():
        assert one["samples_per_second"] > 0
        assert one["peak_bytes"] > 4 * one["parameters"]
        assert one["steps"] == (4 if name.startswith("ddp") else 32)
    # As many bytes on the wire as the ring all-reduces of the measured steps carry. Where nobody
    # waits for them, a part of the last of eight may be under way yet when bytes are counted.
    to_ring = {name: one["bytes_to_ring"] for name, one in found.items()}
    for name in ("ddp", "torch_local_sgd", "easgd_blocking"):
        assert 0.9 < to_ring[name] < 1.2
    for name in ("easgd", "easgd_fragments"):
        assert 0.8 < to_ring[name] < 1.2
    assert 1.0 < to_ring["easgd_often"] < 1.6  # the small ones twice
    for name in ("ddp_fp16", "ddp_bf16", "easgd_bf16"):
        assert 0.4 < to_ring[name] < 0.7
    assert to_ring["easgd_int8"] < 0.4
    assert 0.2 < to_ring["easgd_async"] < 1.5  # worker 1's both ways; 1 where both are as fast
    assert found["limit"]["bytes_per_step"] < found["easgd_int8"]["bytes_per_step"] / 2
    assert (tmp_path / "samples_per_second.png").read_bytes().startswith(b"\x89PNG")

    told = run(tmp_path, "contender=[limit,easgd]", length, "repetitions=2")
    assert told.count(" samples/s") == 2 + 1  # the second repetition only, and the table
    assert len(results(tmp_path)) == len(names) + 2
    assert by_contender(results(tmp_path, "summary"))["easgd"]["repetitions"] == 2

    told = run(tmp_path, chosen, length, "repetitions=2", "minutes=0.0001")
    assert "Time is up. The same command with the same hydra.run.dir goes on." in told
    assert len(results(tmp_path)) == len(names) + 2


@needs_hosts
@needs_peers
@pytest.mark.usefixtures("nothing_left")
def test_torchft_on_two_hosts(tmp_path: Path) -> None:
    run(tmp_path, f"contender=[{','.join(PEERS)}]")
    found = by_contender(results(tmp_path))
    assert list(found) == PEERS
    for one in found.values():
        assert 0.9 < one["bytes_to_ring"] < 1.5  # and the talk of its managers
        assert one["wait_p50"] > 0


@pytest.mark.timeout(200)
def test_under_torchrun_one_that_fails_loses_nothing_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"hydra.run.dir={tmp_path}", *SMALL, "contender=[easgd,torch_local_sgd]"]
    options += ["sweep.over=stall", "sweep.values=[0,0.001]"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    broken = [*torchrun, str(SCRIPT), *options, "contender.easgd.strategy.tau=-1"]
    done = subprocess.run(broken, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 1
    assert "error: easgd was left out: easgd, τ = 4, seed 42, cluster failed" in (
        done.stdout + done.stderr
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run_script(SCRIPT, [*options, f"port={free_port()}"], folder=tmp_path, workers=2)
    failed, *found = results(tmp_path)
    assert failed["error"].startswith("easgd failed on worker ")
    assert [(one["contender"], one["stall"]) for one in found] == [
        *(("torch_local_sgd", 0), ("torch_local_sgd", 0.001), ("easgd", 0), ("easgd", 0.001))
    ]
    for one in found:
        assert (one["network"], one["hosts"], one["speed"]["steps"]) == ("cluster", 2, 16)
        assert one["link_rate"] > 0


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_results_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    options = [f"hydra.run.dir={tmp_path}", *SMALL, "contender=[limit,easgd]", "repetitions=100"]
    with forked_until_written(tmp_path / "results.jsonl", SCRIPT, options) as script_alone:
        assert end_by(number, script_alone)[0] == 128 + number
    assert processes_of(tmp_path) == {}
    assert results(tmp_path)


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_a_contender_that_fails_is_named_with_the_end_of_its_output(tmp_path: Path) -> None:
    told = run(tmp_path, "contender=[easgd,limit]", "contender.easgd.strategy.tau=-1", code=1)
    failed, limit = results(tmp_path)
    assert re.match(r"easgd failed on host [01](.|\n)*tau=-1", failed["error"])
    assert "error: easgd was left out" in told
    assert (failed["speed"], limit["contender"]) == (None, "limit")
