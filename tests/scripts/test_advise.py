"""What scripts/advise.py concludes from numbers, and the script as users run it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import pytest
from advising.judging import Advice, Exchanges, Measured, Memory, Trial, together
from advising.report import command, table
from advising.small import small
from emulation import EmulatedHosts
from processes import processes_of, run_script

from lightning_easgd.schedules import Durations, Observation
from lightning_easgd.schedules.automatic import AutomaticPeriod, smallest_period

SCRIPT = Path(__file__).parents[2] / "scripts" / "advise.py"
REASON = emulation.unavailable()

MEGABYTE = 1_000_000


def exchanges(
    compression: str | None, *exchange_ms: float, cost_ms: float = 0.1, sent: int = 4 * MEGABYTE
) -> Exchanges:
    """Tried once for each duration, in rounds of 16 steps of 10 ms."""
    found = [
        Durations(step=10_000, exchange=int(1e3 * ms), cost=int(1e3 * cost_ms))
        for ms in exchange_ms
    ]
    return Exchanges(compression, [Trial(durations, 16, sent) for durations in found])


def advice(*found: Exchanges, ddp_ms: float = 100, **others: Any) -> Advice:
    measured = Measured(
        model="CNN",
        parameters=MEGABYTE,
        copy_bytes=4 * MEGABYTE,
        workers=4,
        device="cpu",
        fragments=1,
        tau_bounds=(1, 64),
        step_seconds=0.01,
        spread_seconds=0.0,
        ddp_step_seconds=1e-3 * ddp_ms,
        ddp_sent_bytes=6 * MEGABYTE,
        exchanges=list(found),
    )
    return Advice(replace(measured, **others))


def test_a_slow_network_calls_for_a_codec_and_a_small_tau() -> None:
    found = advice(exchanges(None, 400, 410), exchanges("int8", 99, 95, sent=MEGABYTE), ddp_ms=400)
    best = found.best
    assert (best.compression, best.tau, best.saves) == ("int8", 10, 1)
    assert found.options[0].tau == 41
    assert best.step_seconds == pytest.approx(0.010_01)  # an exchange adds 0.1 ms to 10 steps
    assert best.speed_up == pytest.approx(0.4 / 0.010_01)
    assert best.bytes_per_hour == pytest.approx(3600 * MEGABYTE / 0.1001)
    assert found.ddp_bytes_per_hour == 3600 * 15 * MEGABYTE
    assert found.bandwidth_bits == pytest.approx(8 * 4 * MEGABYTE / 0.405)
    printed = table(found)
    assert (
        "EASGD is expected to be 39.96 times as fast as DDP, at τ = 10 and compression=int8."
        in (printed)
    )
    assert "a step under DDP             400.0 ms, 40.00 times as long; 54.0 GB an hour" in printed
    assert "int8         97.0 ms      0.1 ± 0.0 ms     10         36.0 GB" in printed
    assert "yes: 10 instead of 41" in printed
    assert "bandwidth, each way          79 Mbit/s" in printed


def test_a_model_too_small_to_tell_the_bandwidth_says_so() -> None:
    small = advice(exchanges(None, 1, sent=5_200), parameters=1_300)
    assert "CNN, 1,300 parameters trained" in table(small)
    assert "bandwidth, each way          too small to tell: an exchange sends 5.2 kB" in table(
        small
    )
    large = advice(exchanges(None, 1, sent=MEGABYTE))
    assert "CNN, 1.00 M parameters trained" in table(large)
    assert "bandwidth, each way          8000 Mbit/s" in table(large)


@pytest.mark.parametrize(
    ("ddp_ms", "ddp", "nothing_to_gain"), [(10.4, True, True), (10.8, False, False)]
)
def test_ddp_is_the_better_choice_where_it_is_about_as_fast(
    ddp_ms: float, ddp: bool, nothing_to_gain: bool
) -> None:
    found = advice(exchanges(None, 5), ddp_ms=ddp_ms)
    assert found.take_ddp is ddp
    printed = table(found)
    assert ("DDP is the better choice here" in printed) is ddp
    assert ("next to nothing to gain" in printed) is nothing_to_gain


def test_ddp_is_the_better_choice_where_exchanges_hide_at_no_tau_that_is_allowed() -> None:
    found = advice(exchanges(None, 500), ddp_ms=100, tau_bounds=(1, 5))
    assert found.best.step_seconds == 0.1  # five steps wait for 0.5 s
    assert found.take_ddp
    assert "next to nothing" not in table(found)


def test_a_period_that_is_not_free_says_what_it_takes() -> None:
    found = advice(exchanges(None, 1280), ddp_ms=1000)
    assert (found.best.free_tau, found.best.tau) == (128, 64)
    assert "At this τ, the largest allowed, exchanges take 50% of the time." in table(found)


def test_a_codec_that_costs_more_than_it_saves_does_not_pay() -> None:
    found = advice(exchanges(None, 25), exchanges("int8", 8, cost_ms=2))
    assert [option.free_tau for option in found.options] == [3, 10]
    assert found.best.compression is None
    assert "no: costs more than it saves" in table(found)


@pytest.mark.parametrize(
    ("int8_ms", "saves", "said"),
    [
        ((100, 100, 100, 500), 1, "yes: 10 instead of 40"),
        ((100, 100, 500, 500), 0, "no difference beyond the noise"),  # in half of them only
        ((385, 385, 385, 385), 0, "no difference beyond the noise"),  # by less than a tenth
        ((600, 900, 900, 100), -1, "no: costs more than it saves"),
        ((600, 900, 300, 100), 0, "no difference beyond the noise"),
    ],
)
def test_what_pays_does_so_by_more_than_the_noise(
    int8_ms: tuple[float, ...], saves: int, said: str
) -> None:
    found = advice(exchanges(None, 400, 400, 400, 400), exchanges("int8", *int8_ms))
    assert found.options[1].saves == saves
    assert (found.best.compression == "int8") is (saves > 0)
    assert said in table(found)


def test_a_cost_counts_as_far_as_it_is_above_its_noise() -> None:
    once = advice(exchanges(None, 25, cost_ms=8), spread_seconds=0.001).best
    assert once.cost_noise_seconds == pytest.approx(0.004)  # 16 steps that differ by 1 ms
    assert (once.cost_seconds, once.free_tau) == (pytest.approx(0.008), 20)  # 4 ms are 2 % of 20
    often = advice(exchanges(None, 25, 25, 25, 25, cost_ms=8), spread_seconds=0.001).best
    assert (often.cost_noise_seconds, often.free_tau) == (pytest.approx(0.002), 30)
    assert advice(exchanges(None, 25, cost_ms=3), spread_seconds=0.001).best.free_tau == 3


def test_of_two_that_are_much_alike_the_more_exact_is_taken() -> None:
    found = advice(exchanges(None, 400), exchanges("bf16", 200), exchanges("int8", 190))
    assert [option.saves for option in found.options] == [0, 1, 1]
    assert found.best.compression == "bf16"


@pytest.mark.parametrize(("int8_ms", "best"), [(640, "int8"), (650, "topk")])
def test_most_is_held_back_only_where_nothing_else_hides(int8_ms: float, best: str) -> None:
    found = advice(exchanges(None, 2000), exchanges("int8", int8_ms), exchanges("topk", 50))
    assert found.best.compression == best


def test_tau_is_what_auto_chooses_from_what_the_workers_measured() -> None:
    workers = [Durations(9_000, 70_000, 900), Durations(12_000, 50_000, 1_500)]
    automatic = AutomaticPeriod(fragments=2, log=lambda _: None)
    for _ in range(3):
        automatic.observe(Observation(workers))
    assert smallest_period(together(workers), 2, (1, 64)) == automatic.at(0) == 10


def test_small_parameters_are_told_by_size_with_what_they_cost_and_whether_they_hide() -> None:
    sizes = [100, 900, 9_000, 90_000, 900_000]
    found = advice(exchanges(None, 160, 160), sizes=sizes, ddp_ms=400)
    assert found.best.tau == 16
    tenth, hundredth, one = (sum(sizes[:n]) / sum(sizes) for n in (4, 3, 2))
    rows = small(found)
    assert [(row.below, row.parameters) for row in rows] == [(1_000, 2), (10_000, 3), (100_000, 4)]
    for row, share in zip(rows, (one, hundredth, tenth), strict=True):
        assert row.busy == pytest.approx(16 * share / 2 + 1 - share)
        assert not row.hides
    faster = advice(exchanges(None, 40), sizes=sizes, tau_bounds=(16, 64), ddp_ms=400)
    assert [row.hides for row in small(faster)] == [True, True, True]
    sent = 4 * MEGABYTE * (tenth / 2 + (1 - tenth) / 16)
    assert small(faster)[-1].bytes_per_hour == pytest.approx(3600 * sent / 0.01, rel=1e-6)
    assert "100000       4 of 5      10.0%     153.0 GB      43%           yes" in table(faster)
    assert "often.below" not in table(advice(exchanges(None, 40)))


def test_the_period_is_a_multiple_of_that_of_small_parameters() -> None:
    assert advice(exchanges(None, 25)).best.tau == 3
    assert advice(exchanges(None, 25), pause=2).best.tau == 4


def test_memory_is_counted_in_copies_of_the_parameters() -> None:
    full = advice(exchanges(None, 400))
    assert full.memory() == Memory(between=8 * MEGABYTE, within=12 * MEGABYTE)
    assert full.memory(fragments=4) == Memory(between=5 * MEGABYTE, within=6 * MEGABYTE)
    assert full.memory(offload=True) == Memory(0, within=4 * MEGABYTE, host=8 * MEGABYTE)
    int8 = advice(exchanges(None, 400), exchanges("int8", 100))
    assert int8.memory() == Memory(between=13 * MEGABYTE, within=17 * MEGABYTE)
    assert "memory EASGD adds, each      13.0 MB, 17.0 MB in the step of an exchange" in table(int8)
    on_gpu = table(advice(exchanges(None, 400), device="cuda"))
    assert (
        "with strategy.center_device=cpu  0.0 MB, 4.0 MB in the step of an exchange; 8.0 MB in"
        in (on_gpu)
    )


TYPED = ["model=resnet", "seconds=9", "strategy=eamsgd", "strategy.tau=4", "strategy.beta=0.5"]


@pytest.mark.parametrize(
    ("ddp_ms", "typed", "expected"),
    [
        (400, TYPED, "model=resnet strategy=eamsgd strategy.beta=0.5 strategy.tau=10"),
        (10, TYPED, "model=resnet optimizer=nesterov strategy=ddp"),
        (10, [*TYPED, "optimizer=adamw"], "model=resnet optimizer=adamw strategy=ddp"),
        (400, ["vary=auto", "strategy.tau.max=9", "seed=1"], "seed=1 strategy.tau=10"),
        (400, ["data.root=a b", "hydra.run.dir=x", "+tau=3"], "'data.root=a b' strategy.tau=10"),
    ],
)
def test_the_command_is_what_was_typed_with_what_was_found(
    ddp_ms: float, typed: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = advice(exchanges(None, 400), exchanges("int8", 100), ddp_ms=ddp_ms)
    if not found.take_ddp:
        expected += " strategy.compression=int8"
    assert command(found, typed) == f"python scripts/train.py {expected}"
    monkeypatch.setattr(sys, "argv", ["/bin/easgd-advise", *typed])
    assert command(found, typed) == f"easgd-train {expected}"


def advise(folder: Path, *overrides: str, code: int = 0) -> str:
    """Run the script in ``folder``; what it printed."""
    arguments = [*overrides, "hydra.run.dir=run"]
    return run_script(SCRIPT, arguments, folder=folder, workers=None, code=code)


def test_measures_says_how_to_train_and_leaves_its_numbers_only(tmp_path: Path) -> None:
    printed = advise(
        tmp_path, "trainer.devices=2", "seconds=6", "strategy.fragments=2", "codecs=[int8]"
    )
    written = json.loads((tmp_path / "run" / "advice.json").read_text())
    measured = written["measured"]
    full, int8 = (form["trials"][0] for form in measured["exchanges"])
    elements = measured["parameters"]
    assert measured["workers"] == 2
    assert measured["step_seconds"] > 0
    assert 4 * elements == measured["copy_bytes"] == measured["ddp_sent_bytes"]
    assert full["sent_bytes"] == pytest.approx(measured["copy_bytes"], rel=0.01)
    assert int8["sent_bytes"] == pytest.approx(elements, rel=0.05)
    for what in ("steps without exchanges", "steps of DDP", "exchanges in int8"):
        assert f"measuring {what}" in printed
    assert "a step without exchanges" in printed
    told = printed.splitlines()[-1]
    assert told.strip().startswith("python scripts/train.py trainer.devices=2 ")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    hydras = {f"run/.hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    assert left == {"run/advice.json", "run/config.yaml", "run/worker1.log", *hydras}
    train = [sys.executable, str(SCRIPT.with_name("train.py")), *shlex.split(told)[2:]]
    subprocess.run(
        [*train, "--cfg", "job"], cwd=tmp_path, check=True, timeout=60, capture_output=True
    )


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.timeout(240)
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_slow_network_is_measured_as_it_is_and_calls_for_easgd(tmp_path: Path) -> None:
    """What the network cannot carry faster; how long steps take besides depends on the machine."""
    model = ["model=mlp", "model.hidden=[1024,512]"]  # 2.4 MB, a second at 20 Mbit/s
    overrides = [*model, "trainer.devices=1", "trainer.num_nodes=2", "seconds=4", "codecs=[int8]"]
    with EmulatedHosts(2, rate_bits=20e6) as hosts:
        arguments = [*overrides, "hydra.run.dir=run"]
        run_script(SCRIPT, arguments, folder=tmp_path, workers=2, hosts=hosts)
    found = json.loads((tmp_path / "run" / "advice.json").read_text())
    measured = found["measured"]
    assert found["bandwidth_bits_per_second"] < 22e6
    assert 8 * measured["ddp_sent_bytes"] / measured["ddp_step_seconds"] < 22e6
    assert not found["take_ddp"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=1"], "One worker has nobody to exchange with"),
        (["strategy=ddp"], "set strategy=easgd or strategy=eamsgd"),
        (["seconds=0"], "seconds=0 is not allowed. Allowed: a number above 0"),
        (["codecs=[int9]"], "compression='int9' is not a codec. Allowed"),
        (["strategy.overlap=false"], "Set overlap=True"),
        (["trainer.accelerator=tpu"], "error: ModuleNotFoundError: Requirement 'torch_xla"),
    ],
    ids=str,
)
def test_bad_input_says_what_to_do(tmp_path: Path, overrides: list[str], message: str) -> None:
    workers = 1 if "trainer.devices=1" in overrides else 2
    arguments = ["trainer.devices=2", *overrides, "hydra.run.dir=run"]
    printed = run_script(SCRIPT, arguments, folder=tmp_path, workers=workers, code=1)
    assert message in printed


def test_an_option_that_does_not_exist_ends_before_workers_start(tmp_path: Path) -> None:
    assert "no key secondz. Did you mean seconds?" in advise(tmp_path, "secondz=1", code=1)


def test_ctrl_c_ends_all_workers(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, str(SCRIPT)),
            *("trainer.devices=2", "seconds=600", f"hydra.run.dir={tmp_path}/run"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert "measuring" in process.stdout.readline()
            time.sleep(1)
            assert len(processes_of(tmp_path)) == 3  # with the one that was typed
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert processes_of(tmp_path) == {}
