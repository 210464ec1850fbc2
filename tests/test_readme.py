"""README is short, and what it and the documents say of files and tests is so."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pages
from pages import ROOT, Page


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


def test_the_readme_is_read_in_five_minutes() -> None:
    readme = Page("README.md")
    assert len(readme.text.splitlines()) <= 150
    assert len(readme.text.split()) <= 1500


def test_the_source_archive_has_what_the_readme_links_to() -> None:
    kept = (ROOT / "MANIFEST.in").read_text().split()
    tops = {link.relative_to(ROOT).parts[0] for link in Page("README.md").links()}
    assert tops <= {*kept, "LICENSE"}


def test_the_picture_is_drawn_for_light_and_dark_pages() -> None:
    (path,) = re.findall(r"!\[.+\]\((.+\.svg)\)", Page("README.md").text)
    picture = (ROOT / path).read_text()
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    light, dark = picture.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r'class="(?:letter )?(\w+)"', dark))
    assert used <= set(re.findall(r"\.(\w+) \{", light))


def test_who_cites_the_package_cites_this_version() -> None:
    project, citation = ((ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff"))
    (version,) = re.findall(r'^version = "(.+)"$', project, re.M)
    assert re.findall(r"^version: (.+)$", citation, re.M) == [version]


def test_each_feature_names_tests_and_their_files() -> None:
    rows = re.findall(
        r"^\| (?!Lightning feature).+ \| (.+) \|$", Page("docs/features.md").text, re.M
    )
    assert len(rows) > 100
    for row in rows:
        path = Path()
        for file, test in re.findall(r"`(?:([\w/]+\.py)(?:::)?)?(test_\w+)?`", row):
            path = ROOT / "tests" / file if file else path
            assert f"def {test}(" in path.read_text() if test else path.is_file(), row
        assert path.is_file(), row
