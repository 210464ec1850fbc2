"""Random strikes, and that those who look for damage would find it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import chaos
import pytest
import struck
from chaos import ChaosError, Summary
from disk import SmallDisk


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with SmallDisk(Path(folder)):
                return True
        except OSError:
            return False


SMALL_DISKS = _can_mount()


@pytest.mark.timeout(400)
def test_twenty_random_strikes_change_no_bit(tmp_path: Path) -> None:
    lines: list[str] = []
    summary = chaos.run(20, seed=224, workers=2, folder=tmp_path, say=lines.append)
    assert summary.equal == summary.runs > 1, lines
    assert set(summary.strikes) == {"KILL", "TERM", "INT", "STOP"}
    assert sum(summary.strikes.values()) == len(summary.lost) == 20
    assert 0 < max(summary.lost) <= 2 * struck.CHECKPOINT_EVERY
    assert len(lines) == 20 + summary.runs
    assert sum("in set-up" in line for line in lines) > 1

    newest = tmp_path / "undisturbed" / "last.ckpt"
    assert chaos.require_whole(newest.parent, 2) == struck.EPOCHS * struck.STEPS_PER_EPOCH
    (part,) = newest.parent.glob("last.ckpt.workers/*-1.ckpt")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ChaosError, match="does not hold a whole checkpoint"):
        chaos.require_whole(newest.parent, 2)
    part.unlink()
    with pytest.raises(ChaosError, match=r"1\.ckpt"):
        chaos.require_whole(newest.parent, 2)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not SMALL_DISKS, reason="only root can mount a small disk")
def test_loaders_that_hang_and_disks_that_are_full_change_no_bit(tmp_path: Path) -> None:
    lines: list[str] = []
    also = ["STUCK", "SLOW", "FULL", "READ"]
    summary = chaos.run(6, seed=1762, workers=2, folder=tmp_path, also=also, say=lines.append)
    assert summary.equal == summary.runs >= 1, lines
    # A strike that comes late, on a busy machine, does not count.
    assert len(set(also) & set(summary.strikes)) >= 2, lines
    assert not list(tmp_path.glob("struck*/*"))  # their disks are gone


def test_who_takes_too_long_to_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "_LONGEST_END_SECONDS", 0.0)
    strike = chaos.Strike(0, "STOP", step=2, delay_seconds=0, power_cut=False)
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        struck.Struck(folder, 2) as group,
        pytest.raises(ChaosError, match=r"the workers took .* to end after STOP to worker 0"),
    ):
        strike.carry_out(group, None)


@pytest.mark.parametrize(("equal", "code"), [(2, 0), (1, 1)])
def test_the_exit_code_says_whether_all_centers_were_equal(
    equal: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any, **__: Any) -> Summary:
        return Summary(Counter(KILL=3), [1, 2, 0], runs=2, equal=equal)

    monkeypatch.setattr(chaos, "run", run)
    assert chaos.main(["--folder", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert "3 strike(s): 3 KILL; steps lost by one: 1.0 on average, 2 at most" in printed
    assert f"{equal} of 2 run(s)" in printed
