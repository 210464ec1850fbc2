"""What README, CONTRIBUTING and the site say is so; the build itself checks references."""

from __future__ import annotations

import re

import pages
import pytest
from pages import Page

import lightning_easgd

SITE = [page for page in pages.everywhere() if page.path.startswith("docs/")]
REFERENCE = {
    *("docs/features.md", "docs/measured.md", "docs/errors.md", "docs/glossary.md"),
    *(page.path for page in SITE if page.path.startswith("docs/api/")),
}
"""Pages that one looks something up in, and does not read to their end."""


def test_every_public_name_is_documented_once() -> None:
    documented = [
        name
        for page in SITE
        for name in re.findall(r"^\.\. auto\w+:: (\w+)$", page.text, re.M)
        if page.path.startswith("docs/api/")
    ]
    assert len(documented) == len(set(documented))
    assert set(lightning_easgd.__all__) <= set(documented)


@pytest.mark.parametrize("page", SITE, ids=str)
def test_a_page_is_short(page: Page) -> None:
    assert page.path in REFERENCE or page.words <= 1200


@pytest.mark.parametrize("page", pages.everywhere(), ids=str)
def test_what_a_page_links_to_is_there(page: Page) -> None:
    for link in page.links():
        assert link.exists(), link
