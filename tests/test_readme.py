"""What README and documents say of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pages

ROOT = Path(__file__).parents[1]


def test_every_test_that_a_page_names_exists() -> None:
    text = "".join(page.text for page in pages.everywhere())
    files = {path.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/*.py")}
    defined = {
        name
        for path in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = re.findall(r"`(?:([\w/]+\.py)(?:::)?)?(test_\w+)?`", text)
    named = [(file, test) for file, test in named if "test_" in file + test]
    assert len(named) > 50
    assert {file.removeprefix("tests/") for file, _ in named if file} <= files
    assert {test for _, test in named if test} <= defined
