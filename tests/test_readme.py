"""What the README says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_readme_names_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    files = {path.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/*.py")}
    defined = {
        name
        for path in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = re.findall(r"`(?:([\w/]+\.py)(?:::)?)?(test_\w+)?`", readme)
    named = [(file, test) for file, test in named if "test_" in file + test]
    assert len(named) > 50
    assert {file for file, _ in named if file} <= files
    assert {test for _, test in named if test} <= defined
