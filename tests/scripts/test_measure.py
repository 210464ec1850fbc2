"""scripts/measure.py: that it runs; what it finds depends on the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
from measurements.exchange import Turns
from processes import run_script

from lightning_easgd.algorithms import AVERAGED, RULES

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure.py"
REASON = emulation.unavailable()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_both_ends_of_an_exchange_under_every_rule(tmp_path: Path) -> None:
    options = ["ends", "--millions", "0.01", "--tensors", "4", "--repetitions", "2"]
    told = run_script(SCRIPT, options, folder=tmp_path, workers=1)
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line.strip()}
    for name in [*RULES, *AVERAGED]:
        milliseconds, _, in_copies, to_easgd, _ = map(_number, rows[name][1:])
        assert min(milliseconds, in_copies, to_easgd) > 0
    assert rows["easgd"][4] == "1.000"
    kept = {name: float(rows[name][-1]) for name in [*RULES, *AVERAGED]}
    assert kept | {"easgd": 0, "local_sgd": 0, "downpour": 0, "slowmo": 1, "diloco": 1} == kept
    assert kept | {"adownpour": 1, "mvadownpour": 1, "delayed_sgd": 1} == kept


def test_what_a_small_exchange_takes_of_a_processor() -> None:
    """As a user types it: where CUDA was looked for, Lightning forks no process that was forked."""
    command = [sys.executable, str(SCRIPT), "small", "--steps", "20", "--repetitions", "1"]
    told = subprocess.run(
        command, check=True, timeout=150, stdout=subprocess.PIPE, text=True
    ).stdout
    assert "an exchange of 7 parameters with 87 kB at every step, 2 workers" in told
    assert re.search(r"  -?\d+\.\d\d ms of a processor for each worker", told)


@pytest.mark.parametrize("kind", [[], ["--encrypted"]], ids=str)
def test_a_server_against_an_echo(tmp_path: Path, kind: list[str]) -> None:
    pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
    pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
    options = ["server", "--workers", "2", "--megabytes", "0.01", "--repetitions", "1", *kind]
    told = run_script(SCRIPT, options, folder=tmp_path, workers=1)
    assert f"2 workers, 0.01 MB, {'encrypted' if kind else 'plain'}" in told
    rates = {way: float(rate) for way, rate in re.findall(r"(echo|server) +(\d+) MB/s", told)}
    assert min(rates["echo"], rates["server"]) > 0
    assert re.search(r"server / echo \d\.\d+ in the middle of 1 pairs", told)


def _number(cell: str) -> float:
    return 0.0 if cell == "ms" else float(cell)


def test_rounds_with_exchanges_and_steps_without_take_turns() -> None:
    turns = Turns(tau=3, rounds=2)
    due = [0]
    while due[-1] < 36:
        due.append(due[-1] + turns(due[-1]))
    assert due == [0, 3, 12, 15, 24, 27, 36]


def test_what_exchanges_cost_is_found_where_the_machine_slows_down() -> None:
    turns = Turns(tau=3, rounds=2)
    steps = [0.1 + 1e-4 * step for step in range(30)]
    for exchange in (6, 9, 18, 21):
        steps[exchange] *= 1.3
    assert turns.costs(steps) == pytest.approx([0.3, 0.3], rel=0.02)


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_what_an_exchange_costs_on_emulated_hosts(tmp_path: Path) -> None:
    options = ["exchange", "--data=digits", "--network=unlimited", "--hosts=2", "--tau=2"]
    told = run_script(
        SCRIPT, [*options, "--pairs=2", "--repetitions=2"], folder=tmp_path, workers=1
    )
    assert "unlimited, 2 hosts: 4 x 8 steps with an exchange every 2" in told
    found = re.search(r"an exchange +(\S+) ms, (\S+) ± (\S+) steps", told)
    assert found is not None
    assert float(found[3]) > 0
    at_eight = re.search(r"longer by (\S+)% at τ = 8", told)
    assert at_eight is not None
    assert float(at_eight[1]) == pytest.approx(100 * float(found[2]) / 8, abs=0.06)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--network=fast", "error: network got 'fast'"),
        (
            "--hosts=1",
            "error: hosts=1 is not allowed",
        ),
        ("--tau=0", "error: tau got 0 and pairs 16; allowed are whole numbers from 1"),
        ("--repetitions=0", "error: repetitions=0 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, option: str, message: str) -> None:
    options = ["exchange", "--data=digits", option]
    assert message in run_script(SCRIPT, options, folder=tmp_path, workers=1, code=1)
    assert list(tmp_path.iterdir()) == []
