"""The gallery of schedules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gallery
import pages
import pytest
from processes import run_script

ROOT = Path(__file__).parents[2]


def test_every_schedule_that_can_be_chosen_has_its_panel() -> None:
    files = {path.stem for path in (ROOT / "conf" / "vary").glob("*.yaml")}
    # What "auto" chooses follows measured times, which no other run has.
    assert {panel.name for panel in gallery.PANELS} == files - {"auto"}


def test_a_picture_is_drawn_from_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs of two steps each; those that are there are not done again."""
    short = ["trainer.devices=1", "trainer.max_epochs=1", "trainer.limit_train_batches=12"]
    chosen = [panel for panel in gallery.PANELS if panel.name in ("linear", "consensus_target")]
    runs = [(chosen[0], gallery.train(chosen[0], tmp_path, short))]

    def forked(command: list[str], **_: Any) -> None:
        run_script(Path(command[1]), command[2:], folder=tmp_path, workers=None)

    monkeypatch.setattr(subprocess, "run", forked)  # one of them suffices as a user starts it
    runs.append((chosen[1], gallery.train(chosen[1], tmp_path, short)))
    monkeypatch.undo()
    again = [(panel, gallery.train(panel, tmp_path, ["no.such=option"])) for panel in chosen]
    assert again == runs
    steps, taus = gallery.curve(runs[0][1], "tau")
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    assert taus == sorted(taus)
    assert taus[0] < taus[-1] <= 16
    gallery.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_small_and_its_command_is_beside_it() -> None:
    picture = ROOT / "docs" / "schedules.png"
    assert 0 < picture.stat().st_size < 200_000
    (page,) = [page for page in pages.everywhere() if "schedules.png)" in page.text]
    assert "python scripts/gallery.py" in page.text


def test_a_picture_of_the_documents_is_replaced_only_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(gallery, "PANELS", ())
    monkeypatch.setattr(gallery, "draw", lambda runs, path: drawn.append(path))
    for named in ([], ["--picture", "docs/schedules.png"]):
        monkeypatch.setattr(sys, "argv", ["gallery.py", "--folder", str(tmp_path), *named])
        gallery.main()
    assert drawn == [tmp_path / "schedules.png", Path("docs/schedules.png")]


def test_the_script_says_how_it_is_used() -> None:
    script = ROOT / "scripts" / "gallery.py"
    said = subprocess.run(
        [sys.executable, str(script), "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "--folder" in said
