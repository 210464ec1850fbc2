"""The commands of the installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import commands
import pytest

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = SETTINGS["tool"]["setuptools"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Folders where the wheel has them; .ci/run installs the wheel itself."""
    for package, source in SETUPTOOLS["package-dir"].items():
        copytree(ROOT / source, tmp_path / "site" / package.replace(".", "/"))
    return tmp_path / "site"


def command(name: str, *arguments: str, site: Path, folder: Path) -> str:
    """What the command prints when it is typed in a folder."""
    module, _, function = SETTINGS["project"]["scripts"][name].partition(":")
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}()", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_easgd_train_trains_from_an_empty_folder_with_the_installed_configurations(
    site: Path, tmp_path: Path
) -> None:
    short = ["model=mlp", "trainer.max_epochs=1", "trainer.devices=2", "hydra.run.dir=run"]
    printed = command("easgd-train", *short, site=site, folder=tmp_path / "empty")
    assert "test/accuracy" in printed
    report = json.loads((tmp_path / "empty" / "run" / "report.json").read_text())
    assert report["workers"] == 2


def test_easgd_advise_takes_the_groups_of_a_run(site: Path, tmp_path: Path) -> None:
    printed = command("easgd-advise", "--cfg", "job", site=site, folder=tmp_path / "empty")
    assert "seconds: 60" in printed
    assert "_target_: lightning_easgd.EASGDStrategy" in printed


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "hydra" else object())
    with pytest.raises(SystemExit) as ended:
        commands.train()
    assert ended.value.code == ("easgd-train needs hydra: pip install -e '.[scripts]'")


def test_every_package_is_in_the_wheel() -> None:
    scripts = "lightning_easgd_commands.scripts"
    found = {f"{scripts}.{path.parent.name}" for path in (ROOT / "scripts").glob("*/*.py")}
    for path in (ROOT / "lightning_easgd").rglob("__init__.py"):
        found.add(".".join(path.parent.relative_to(ROOT).parts))
    assert {*found, scripts, "lightning_easgd_commands.conf"} == set(SETUPTOOLS["packages"])
