"""Random strikes, and that those who look for damage would find it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import chaos
import pytest
import struck
from chaos import ChaosError, Summary


@pytest.mark.timeout(400)
def test_twenty_random_strikes_change_no_bit(tmp_path: Path) -> None:
    lines: list[str] = []
    summary = chaos.run(20, seed=224, workers=2, folder=tmp_path, say=lines.append)
    assert summary.equal == summary.runs > 1, lines
    assert set(summary.signals) == {"SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP"}
    assert sum(summary.signals.values()) == len(summary.lost) == 20
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


@pytest.mark.parametrize(("equal", "code"), [(2, 0), (1, 1)])
def test_the_exit_code_says_whether_all_centers_were_equal(
    equal: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any, **__: Any) -> Summary:
        return Summary(Counter(SIGKILL=3), [1, 2, 0], runs=2, equal=equal)

    monkeypatch.setattr(chaos, "run", run)
    assert chaos.main(["--folder", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert "3 strike(s): 3 SIGKILL; steps lost by one: 1.0 on average, 2 at most" in printed
    assert f"{equal} of 2 run(s)" in printed
