"""The parts of scripts/comparing, each by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from comparing import speed_report as report
from comparing.agent import JobError, in_child
from comparing.contender import Contender, choose, named
from comparing.counting import (
    interface_towards,
    peak_resident_bytes,
    resident_bytes,
    sent_bytes,
)
from comparing.ledger import Ledger
from comparing.meter import Meter, Pace, Stalls, Window
from comparing.networks import Setting, rate_of
from comparing.progress import Progress
from comparing.result import Job, Result, Speed
from comparing.speed_plan import jobs_of, rotated, settings_of
from comparing.statistics import median_ratio, percentile
from comparing.store import Store
from comparing.summary import Summary, summarize

SETTING = Setting("100mbit", 4)
WORKER = {
    "steps": 8,
    "seconds": 2.0,
    "step_seconds": [0.1] * 7 + [1.3],
    "waits": [0.0, 1.0],
    "sent_bytes": 8 * 1500,
    "peak_bytes": 7,
    "parameters": 1000,
    "period": 16,
    "samples": 8 * 64,
    "coupled": True,
}


@pytest.mark.parametrize(
    ("network", "bits"),
    [("20mbit", 20e6), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("56kbit", 56e3), ("unlimited", None)],
)
def test_networks(network: str, bits: float | None) -> None:
    assert rate_of(network) == bits


@pytest.mark.parametrize("network", [100, "100", "0mbit", "-1mbit", "mbit", "100 mbit", "", None])
def test_what_is_no_network_is_refused(network: object) -> None:
    with pytest.raises(ValueError, match=r"allowed are 'unlimited' and a rate .* network=100mbit"):
        rate_of(network)


def test_a_sweep_has_a_setting_for_each_value() -> None:
    assert settings_of(SETTING, None, []) == [SETTING]
    assert settings_of(SETTING, "hosts", [2, 16]) == [Setting("100mbit", 2), Setting("100mbit", 16)]
    assert settings_of(SETTING, "stall", [0.5]) == [Setting("100mbit", 4, 0.5)]


@pytest.mark.parametrize(
    ("over", "values", "message"),
    [
        ("colour", [1], "allowed are network, hosts, stall"),
        ("hosts", [], "sweep.values got nothing"),
        ("hosts", [2, 1], "hosts=1 is not allowed. Allowed: a whole number of hosts, at least 2"),
        ("hosts", ["two"], "hosts='two' is not allowed"),
        ("hosts", [201], "up to 200"),
        ("stall", [-1], "seconds from 0 on"),
    ],
)
def test_an_impossible_sweep_is_refused(over: str, values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(SETTING, over, values)


def test_contenders_take_turns_and_every_repetition_begins_with_another() -> None:
    jobs = jobs_of([SETTING], {"a": 1, "b": None, "c": 16}, 2, seed=42)
    assert [(job.contender, job.seed) for job in jobs] == [
        *(("a", 42), ("b", 42), ("c", 42)),
        *(("b", 43), ("c", 43), ("a", 43)),
    ]
    assert (jobs[2].tau, jobs[2].setting) == (16, SETTING)
    assert Job(**json.loads(json.dumps(jobs[4].to_json()))) == jobs[4]
    assert rotated("abc", 5) == ["c", "a", "b"]
    with pytest.raises(ValueError, match="repetitions=0 is not allowed"):
        jobs_of([SETTING], {"a": 1}, 0)


HERE = Contender("here", strategy={}, period=1)
PEER = Contender("peer", strategy={}, requires="no_such_package", install="pip install it")
GPU = Contender("gpu", strategy={}, gpu_only="it is for GPUs only")


def test_a_peer_that_cannot_run_is_left_out_of_the_default_and_refused_by_name() -> None:
    everybody = {"here": HERE, "peer": PEER, "gpu": GPU}
    chosen, missing = choose(everybody, "cpu", by_name=False)
    assert list(chosen) == ["here"]
    assert missing == {
        "peer": "no_such_package is not installed: pip install it",
        "gpu": "it is for GPUs only: run it with accelerator=gpu",
    }
    assert "gpu" in choose(everybody, "gpu", by_name=False)[0]
    with pytest.raises(ValueError, match="peer cannot run here, no_such_package is not installed"):
        choose({"here": HERE, "peer": PEER}, "cpu", by_name=True)
    with pytest.raises(ValueError, match="peer cannot run here"):
        choose({"peer": PEER}, "cpu", by_name=False)
    with pytest.raises(ValueError, match="empty list"):
        choose({}, "cpu", by_name=True)


def test_contenders_are_named_by_their_files(tmp_path: Path) -> None:
    for name in ("ddp", "easgd"):
        (tmp_path / f"{name}.yaml").touch()
    assert named(["hosts=2", "contender=[ddp, easgd]"], tmp_path) == ["ddp", "easgd"]
    assert named(["contender=ddp"], tmp_path) == ["ddp"]
    assert named(["hosts=2", "contender=[]"], tmp_path) == []
    with pytest.raises(ValueError, match=r"got dpp; allowed are ddp, easgd, and files"):
        named(["contender=[dpp,easgd]"], tmp_path)
    with pytest.raises(ValueError, match=r"any more\. Write contender=\[ddp,easgd\]\."):
        named(["compared=[ddp,easgd]"], tmp_path)


def test_bytes_are_counted_on_the_interface_that_carries_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_towards("127.0.0.1") == "lo"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        before = sent_bytes("lo")
        sender.sendall(bytes(100_000))
        left = 100_000
        while left:
            left -= len(receiver.recv(left))
        assert sent_bytes("lo") - before >= 100_000
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable7")
    with pytest.raises(ValueError, match="no interface 'cable7'; set GLOO_SOCKET_IFNAME"):
        sent_bytes(interface_towards("127.0.0.1"))


def test_the_peak_of_a_forked_process_is_its_own() -> None:
    def peak_of(size: int) -> int:
        before = resident_bytes()
        len(bytes(os.urandom(1)) * size)
        return peak_resident_bytes() - before

    assert in_child(lambda: peak_of(64 << 20)) > 60 << 20  # the kernel counts in batches
    assert in_child(lambda: peak_of(1)) < 32 << 20


def test_a_child_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(lambda: [1, 2]) == [1, 2]
    with pytest.raises(JobError, match="exit code 1"):
        in_child(lambda: 1 / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(JobError, match="no use"):
        in_child(lambda: time.sleep(60), why_stop=lambda: "there is no use")
    with pytest.raises(JobError, match=f"exit code -{signal.SIGKILL.value}"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_meter_reads_its_window_only() -> None:
    waited = iter([0.0, 0.5, 0.5, 1.5])
    meter = Meter(Window(first=2, steps=3), "lo", lambda: next(waited))
    for _ in range(5):
        meter.on_train_batch_end()
    assert len(meter.step_seconds) == 3
    assert sum(meter.step_seconds) == pytest.approx(meter.seconds)
    assert meter.waits == [0.5, 1.0]  # a step that awaited nothing is no exchange
    assert meter.sent_bytes >= 0


def test_a_meter_knows_when_nobody_counts_waits() -> None:
    meter = Meter(Window(first=1, steps=1), "lo", lambda: None)
    for _ in range(2):
        meter.on_train_batch_end()
    assert meter.waits is None


def test_stalls_come_at_the_same_steps_under_every_contender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stalled(seconds: float, seed: str) -> list[int]:
        slept: list[int] = []
        step = 0
        monkeypatch.setattr("comparing.meter.time.sleep", lambda _: slept.append(step))
        stalls = Stalls(seconds, seed)
        for step in range(1600):  # noqa: B007
            stalls.on_train_batch_start()
        return slept

    first = stalled(0.5, "0")
    assert 50 < len(first) < 150  # once in 16 steps
    assert stalled(0.5, "0") == first
    assert stalled(0.5, "1") != first
    assert stalled(0.0, "0") == []


def test_a_slow_worker_takes_as_many_times_as_long_but_for_its_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = types.SimpleNamespace(now=0.0, waited=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("comparing.meter.time.sleep", sleep)
    monkeypatch.setattr("comparing.meter.time.perf_counter", lambda: clock.now)
    pace = Pace(0.1, 4, lambda: clock.waited)
    pace.on_train_batch_start()
    clock.now, clock.waited = clock.now + 0.02 + 0.5, 0.5
    pace.on_train_batch_end()
    assert clock.now == pytest.approx(4 * 0.12 + 0.5)


def test_percentiles_and_ratios_of_neighbours() -> None:
    values = [float(v) for v in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 95), percentile([7.0], 95)) == (50, 95, 7)
    # Medians of the ratios 2, 2, 4 within repetitions, not the ratio of medians, 20/8.
    assert median_ratio({0: 2.0, 1: 20.0, 2: 32.0}, {0: 1.0, 1: 10.0, 2: 8.0}) == 2
    assert median_ratio({0: 2.0, 1: 9.0}, {0: 1.0}) == 2
    assert median_ratio({0: 1.0}, {1: 1.0}) is None


def test_a_speed_is_by_the_slowest_worker_that_others_wait_for_and_the_bytes_of_all() -> None:
    other = WORKER | {"seconds": 4.0, "sent_bytes": 8 * 4500, "peak_bytes": 9}
    found = Speed.of([WORKER, other])
    assert found.samples_per_second == 2 * 64 * 8 / 4.0
    apart = Speed.of([each | {"coupled": False} for each in (WORKER, other)])
    assert apart.samples_per_second == 64 * 8 / 2.0 + 64 * 8 / 4.0
    assert apart.bytes_per_step == (8 * 1500 / 2 + 8 * 4500 / 4) / (8 / 2 + 8 / 4)
    assert found.bytes_per_step == 3000
    assert found.bytes_to_ring == 3000 * 16 / (4 * 1000)  # 2 (p-1)/p is 1
    assert (found.step_p50, found.step_p95) == (0.1, 1.3)
    assert (found.wait_p50, found.wait_p95) == (0.0, 1.0)
    assert found.peak_bytes == 9


def result(contender: str, repetition: int, rate: float, **others: object) -> Result:
    job = Job(contender, 16, None, repetition, **asdict(SETTING))
    speed = replace(Speed.of([WORKER] * 4), samples_per_second=rate, **others)
    return Result.of(job, {}, 9.0, speed=speed)


def some_results() -> list[Result]:
    silent = {"wait_p50": None, "wait_p95": None}
    return [
        *(result("limit", r, rate, step_p50=0.08, **silent) for r, rate in [(0, 100), (1, 120)]),
        *(result("ddp", r, rate, **silent) for r, rate in [(0, 25), (1, 40)]),
        result("easgd", 0, 90),
    ]


def test_a_summary_has_medians_spread_and_ratios() -> None:
    limit, ddp, easgd = summarize(some_results())
    assert (limit.samples_per_second, limit.lowest, limit.highest) == (110, 100, 120)
    assert limit.wait_p50 is None
    assert ddp.ratios["limit"] == pytest.approx((0.25 + 1 / 3) / 2)
    # Nothing times DDP's waits: they are what its steps take longer.
    assert not ddp.waits_are_counted
    assert ddp.wait_p50 == pytest.approx(0.02)
    assert (easgd.repetitions, easgd.ratios["limit"], easgd.ratios["ddp"]) == (1, 0.9, 3.6)
    assert (easgd.wait_p50, easgd.wait_p95, easgd.waits_are_counted) == (0.0, 1.0, True)


def test_the_table_has_a_row_for_each_contender() -> None:
    text = report.table(summarize(some_results()), {"ddp": "DDP"}, ["limit"])
    lines = text.splitlines()
    assert lines[0] == "100mbit, 4 hosts; medians of 1-2 repetition(s)"
    assert [line.split()[0] for line in lines[2:]] == ["limit", "DDP", "easgd"]
    assert "90.0 %" in lines[4]
    assert "~20.0 ms" in lines[3]


def test_summaries_are_json_lines(tmp_path: Path) -> None:
    summaries = summarize(some_results())
    report.write_lines(summaries, tmp_path / "summary.jsonl")
    lines = (tmp_path / "summary.jsonl").read_text().splitlines()
    assert [Summary(**json.loads(line)) for line in lines] == summaries


@pytest.mark.parametrize("networks", [["100mbit"], ["unlimited", "10mbit", "1gbit"]])
def test_the_picture_has_a_line_or_bar_for_each_contender(
    tmp_path: Path, networks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib")
    drawn = []
    figure = figure_module.Figure
    monkeypatch.setattr(
        figure_module, "Figure", lambda *args, **kw: drawn.append(figure(*args, **kw)) or drawn[0]
    )
    summaries = [
        replace(summary, network=network)
        for network in networks
        for summary in summarize(some_results())
    ]
    report.draw(summaries, {}, "network", tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    if len(networks) == 1:
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["limit", "ddp", "easgd"]
    else:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [
            *("10mbit", "1gbit", "unlimited"),
        ]
        assert len(axes.containers) == 3


def test_results_are_gone_on_with_under_the_same_settings_only(tmp_path: Path) -> None:
    found = [replace(one, settings={"steps": 8}) for one in some_results()]
    failed = replace(found[0], seed=2, speed=None, error="it broke")
    first = Ledger(tmp_path, ["limit", "ddp"], lambda _: {"steps": 8})
    for each in [*found, failed]:
        first.keep(each)
    assert Store(tmp_path).read() == [*found, failed]
    second = Ledger(tmp_path, ["limit", "ddp"], lambda _: {"steps": 8})
    second.go_on()
    assert list(second.found.values()) == found[:4]  # easgd takes no part any more
    assert second.is_open(failed.job)
    assert not first.is_open(failed.job)
    other = Ledger(tmp_path, ["limit", "ddp"], lambda _: {"steps": 16})
    other.go_on()
    assert other.found == {}


def test_a_damaged_line_is_said_with_its_number(tmp_path: Path) -> None:
    Store(tmp_path).add(some_results()[0])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"contender": "ddp"')
    with pytest.raises(ValueError, match=r"results.jsonl got a line 2 .* another hydra.run.dir"):
        Store(tmp_path).read()


def test_progress_judges_what_is_left_by_what_was_done() -> None:
    def job_of(name: str, network: str, hosts: int) -> Job:
        return Job(name, 16, None, 0, network, hosts=hosts)

    jobs = jobs_of([SETTING], {"a": 16, "b": 16}, 2)
    progress = Progress([(job_of("c", "100mbit", 2), 5.0)])
    assert progress.end(jobs[0], 100.0, jobs[1:]) == "[2/5, about 4 min left]"
    assert progress.end(jobs[1], 10.0, jobs[2:]) == "[3/5, about 2 min left]"
    assert [progress.expected(job) for job in jobs[2:]] == [10, 100]  # b as b before, a as a
    assert progress.expected(job_of("c", "100mbit", 4)) == 10  # twice the hosts
    assert progress.expected(job_of("b", "1gbit", 8)) == 20
    assert progress.expected(job_of("d", "100mbit", 4)) == 4 * (5 / 2 + 100 / 4 + 10 / 4) / 3
    assert progress.end(jobs[2], 1.0, []) == "[4/4]"


def test_runs_that_try_rates_are_shorter_and_none_was_on_the_network_yet() -> None:
    progress = Progress(work=lambda job: 1 if job.tuning else 6, at_once=lambda job: 2)
    trial = Job("a", 16, 0.1, 0, None, tuning=True, hosts=4)
    final = Job("a", 16, 0.1, 0, "100mbit", hosts=4)
    left = [replace(trial, rate=0.2), final, replace(final, seed=1)]
    assert progress.end(trial, 10.0, left) == "[1/4, more than 65 s left]"
    assert progress.end(final, 200.0, left[2:]) == "[2/3, about 2 min left]"
