"""Faults of workers at their own pace: the plan, what counts as lost, and going on with it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import chaos
import faults
import numpy as np
import pytest
import struck_apart
from faults import KINDS, Fault, Found, judge, run_all, table
from processes import processes_of
from struck_apart import STEPS, Log, Told


def fault(kind: str = "none", **changed: object) -> Fault:
    return replace(Fault.draw(kind, 0, 0, 2), when=1, **changed)


def test_faults_are_the_same_for_the_same_seed_and_happen_to_all_at_all_times() -> None:
    drawn = [Fault.draw(kind, number, 1, 4) for kind in KINDS for number in range(50)]
    assert drawn == [Fault.draw(each.kind, each.number, 1, 4) for each in drawn]
    assert drawn[0] != Fault.draw("none", 0, 2, 4)
    assert {each.when for each in drawn} == set(range(4))
    assert all(1 <= each.step < STEPS for each in drawn)
    assert min(each.step for each in drawn) < STEPS / 10
    assert max(each.step for each in drawn) > 9 * STEPS / 10
    assert {each.of_server for each in drawn if each.kind == "cut"} == {True, False}
    assert all(each.of_server for each in drawn if each.kind in ("server", "primary"))
    assert not any(each.of_server for each in drawn if each.kind in ("none", "worker"))


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


START, FIRST, SECOND, THIRD = vector(1, 2), vector(0.1, 0.2), vector(0.3, -0.1), vector(-0.2, 0.7)


def told(sent: list[np.ndarray], versions: list[int], delivered: np.ndarray) -> Told:
    moved = -np.sum(sent, axis=0, dtype=np.float64)
    return Told(START, sent, versions, len(sent), moved, STEPS, delivered, accuracy=0.9)


def both(delivered: np.ndarray) -> list[Told]:
    """Two workers; the second sent one difference between two of the first."""
    return [told([FIRST, THIRD], [1, 3], delivered), told([SECOND], [2], delivered)]


def test_nothing_is_lost_where_the_center_has_each_difference_once() -> None:
    found = judge(fault(), both(((START + FIRST) + SECOND) + THIRD))
    assert (found.error, found.added, found.lost, found.steps_lost) == (None, 3, 0, 0)
    assert found.steps == [STEPS, STEPS]


@pytest.mark.parametrize(
    "delivered", [(START + FIRST) + THIRD, (((START + FIRST) + SECOND) + SECOND) + THIRD]
)
def test_a_difference_that_is_missing_or_there_twice_is_found(delivered: np.ndarray) -> None:
    found = judge(fault(), both(delivered))
    assert found.error == "the center is not the sum of what was added"
    assert found.lost >= 1


@pytest.mark.parametrize("arrived", [True, False])
def test_whoever_was_killed_may_have_sent_one_more(arrived: bool) -> None:
    delivered = ((START + FIRST) + SECOND) + THIRD if arrived else START + FIRST
    versions = [1, 3] if arrived else [1]
    sent = [FIRST, THIRD] if arrived else [FIRST]
    killed = Told(START, [SECOND])
    found = judge(fault("worker"), [told(sent, versions, delivered), killed])
    assert (found.error, found.added) == (None, len(versions))
    # Two that nobody was told of are not those of one worker.
    found = judge(fault("worker"), [told(sent, [each + 2 for each in versions], delivered), killed])
    assert "to nobody" in str(found.error)


def test_a_version_that_two_were_told_is_one_lost() -> None:
    delivered = START + FIRST
    found = judge(fault("primary"), [told([each], [1], delivered) for each in (FIRST, SECOND)])
    assert found.lost == 1
    assert found.error == "1 versions of the center were told twice, 0 to nobody"


def test_steps_lost_other_centers_and_weights_that_moved_by_themselves_are_found() -> None:
    workers = both(((START + FIRST) + SECOND) + THIRD)
    short = [workers[0], replace(workers[1], steps=STEPS - 2)]
    assert judge(fault("stop"), short).error == "survivors lost 2 steps"
    other = [workers[0], replace(workers[1], delivered=START)]
    assert judge(fault(), other).error == "workers delivered different centers"
    assert workers[0].moved is not None
    moved = [replace(workers[0], moved=workers[0].moved + 1e-3), workers[1]]
    assert "0.001 from where its steps and differences lead" in str(judge(fault(), moved).error)


def test_what_is_there_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Fault] = []

    def run(fault: Fault, folder: Path) -> Found:
        ran.append(fault)
        wrong = None if fault.kind == "none" else "it hung"
        return Found(asdict(fault), error=wrong, accuracy=None if wrong else 0.95, added=7)

    monkeypatch.setattr(faults, "run", run)
    lines: list[str] = []
    options = {"seed": 3, "workers": 2, "folder": tmp_path, "say": lines.append}
    run_all(["none", "server"], 2, **options)
    assert [(each.kind, each.number) for each in ran] == [
        *(("none", 0), ("server", 0), ("none", 1), ("server", 1))
    ]
    assert "none: 7 differences, none lost, 95.00 %" in lines[0]
    assert "server of the server at step" in lines[1]
    found = run_all(["none", "server"], 3, **options)
    assert (len(ran), len(found)) == (6, 6)
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 6
    text = table(found)
    assert "| nothing | 3 | 3 | 0 | 21, 0 | 95.00 % | 0 |" in text
    assert "| SIGKILL of the server, started again | 3 | 0 | 0 | 21, 0 | - | 0 |" in text


def test_a_link_needs_root_and_other_kinds_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "unavailable", lambda: "only root may")
    monkeypatch.setattr(chaos, "run_all", lambda *_, **__: [Found({"kind": "stop"}, accuracy=1.0)])
    options = ["--center", "--folder", str(tmp_path), "--kinds"]
    assert chaos.main([*options, "cut"]) == 1
    assert "only root may. Or leave cut out of --kinds" in capsys.readouterr().out
    assert chaos.main([*options, "stop"]) == 0
    with pytest.raises(SystemExit):
        chaos.main([*options, "flood"])
    assert "invalid choice: 'flood'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chaos.main([*options, "stop", "--also", "FULL"])
    assert "--also" in capsys.readouterr().err


def test_a_log_ends_where_its_worker_was_killed(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.write(sent=FIRST)
    log.write(versions=1)
    log.write(sent=SECOND)
    path = tmp_path / "log"
    path.write_bytes(path.read_bytes()[:-5])
    read = Told.read(path)
    assert (len(read.sent), read.versions, read.moved) == (1, [1], None)


@pytest.mark.timeout(200)
def test_a_server_that_is_killed_and_started_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
    for module in (faults, struck_apart):
        monkeypatch.setattr(module, "STEPS", 40)
    drawn = Fault.draw("server", 0, 0, 2)
    found = faults.run(replace(drawn, step=12, pause_seconds=0.0), tmp_path / "run")
    assert (found.error, found.lost, found.steps_lost, found.steps) == (None, 0, 0, [40, 40])
    assert 0 < found.added <= 2 * 40 // 4
    assert found.accuracy is not None
    assert processes_of(tmp_path) == {}
    assert not (tmp_path / "run").exists()
