"""The page of scripts/compare.py in headless Chromium: on a phone, on a desktop, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic
from browser import CHROMIUM, Tab, browser
from presenting.page import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")

ORDER = ["summary", "numbers", "money", "when-not", "curves", "time-per-step", "how", "failed"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = [
        synthetic.diverged(each) if each.contender == "downpour" and each.network else each
        for each in synthetic.results()
    ]
    return write_page(results, synthetic.about(), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_its_sections_are_in_order_and_nothing_complains(
    tab: Tab, page: Path, width: int, dark: bool
) -> None:
    tab.look(page, width=width, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run("[...document.querySelectorAll('section')].map(each => each.id)") == ORDER
    # Tables scroll within their boxes, and figures are no wider than there is room.
    wide = "[...document.querySelectorAll('.box, svg, form, dl, figure')]"
    assert tab.run(f"{wide}.filter(e => e.getBoundingClientRect().right > {width}).length") == 0
    assert tab.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_figures_have_the_ink_and_paper_of_the_page(tab: Tab, page: Path, dark: bool) -> None:
    tab.look(page, width=1280, dark=dark)
    ink, paper = (
        ["rgb(232, 233, 234)", "rgb(21, 23, 26)"],
        ["rgb(27, 28, 29)", "rgb(255, 255, 255)"],
    )[not dark]
    style = "getComputedStyle(document.{})['{}']"
    assert tab.run(style.format("body", "color")) == ink
    assert tab.run(style.format("body", "backgroundColor")) == paper
    assert tab.run(style.format("querySelector('svg [id$=patch_1] path')", "fill")) == paper
    assert tab.run(style.format("querySelector('svg [id$=text_1] g')", "fill")) == ink


def test_prices_are_calculated_again_when_a_field_changes(tab: Tab, page: Path) -> None:
    tab.look(page, width=360)
    before = tab.run("[...document.querySelectorAll('.price')].map(e => e.textContent)")
    assert before
    type_ = (
        "(id => value => {{ const field = document.getElementById(id); field.value = value;"
        " field.dispatchEvent(new Event('input')); }})('{}')({})"
    )
    tab.run(type_.format("price-hour", "2.5"))
    tab.run(type_.format("price-gigabyte", "0.5"))
    tab.run(type_.format("trainings", "10"))
    cells = "[...document.querySelectorAll('.price')]"
    read = f"{cells}.map(e => [e.dataset.hours, e.dataset.gigabytes, e.textContent])"
    found = tab.run(read)
    for (hours, gigabytes, shown), old in zip(found, before, strict=True):
        assert float(shown) == pytest.approx(
            10 * (2.5 * float(hours) + 0.5 * float(gigabytes)), abs=0.006
        )
        assert shown != old
    tab.run(type_.format("price-hour", "''"))
    assert "NaN" not in str(tab.run(read))
    assert tab.complaints == []
