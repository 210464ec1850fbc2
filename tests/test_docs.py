"""What README, CONTRIBUTING and the site say is so; the build itself checks references.

The Python examples of a page run one after the other, as one script of two workers, for a few
steps. Besides what the page imports they have ``model`` and ``datamodule``.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch
import pages
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from pages import ROOT, Page
from plugging import replace_whole
from processes import run_workers

import lightning_easgd
from lightning_easgd import exchange

SITE = [page for page in pages.everywhere() if page.path.startswith("docs/")]
REFERENCE = {
    *("docs/features.md", "docs/measured.md", "docs/errors.md", "docs/glossary.md"),
    "docs/findings.md",
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


def test_the_glossary_has_every_word_of_the_code() -> None:
    (code,) = re.findall(r"Glossary: .*?\n\n(.*)", exchange.__doc__ or "", re.S)
    terms = re.findall(r"^ {4}(\S.*?) {2,}\S", code, re.M)
    page = (ROOT / "docs" / "glossary.md").read_text()
    assert len(terms) > 20
    for term in terms:
        assert f"\n{term.replace('`', '')}\n" in page, term


@pytest.mark.parametrize("page", SITE, ids=str)
def test_a_page_is_short(page: Page) -> None:
    assert page.path in REFERENCE or page.words <= 1200


DRAWN_BY = {
    "comparison.png": ("compare", "test_a_small_comparison_and_going_on_with_it"),
    "schedules.png": ("gallery", "test_a_picture_is_drawn_from_real_runs"),
    "stability.png": ("stability", "test_the_picture_is_drawn"),
}
"""The script that draws a picture, and the test that runs it small."""


def test_a_picture_has_its_command_beside_it_and_a_test() -> None:
    drawings = {"elastic_link.svg"}  # its text is its source
    pictures = {
        path.name for path in (ROOT / "docs").glob("*.*") if path.suffix in (".png", ".svg")
    }
    assert pictures == {*DRAWN_BY, *drawings}
    for picture, (script, test) in DRAWN_BY.items():
        (page,) = [page for page in SITE if f"]({picture})" in page.text]
        assert f"`python scripts/{script}.py`" in page.text.partition(f"]({picture})")[2]
        assert f"def {test}(" in (ROOT / "tests" / "scripts" / f"test_{script}.py").read_text()


@pytest.mark.parametrize("page", pages.everywhere(), ids=str)
def test_what_a_page_links_to_is_there(page: Page) -> None:
    for link in page.links():
        assert link.exists(), link


PATH = ["README.md", "docs/quickstart.md", "docs/own_module.md", "docs/machines.md"]
"""What a newcomer reads, in this order."""

KNOWN = {
    *("GPU", "CPU", "TPU", "MPS", "SGD", "TCP", "SLURM", "MNIST"),
    *("DOWNPOUR", "EAMSGD"),  # the names of methods, which are links or stand beside what they are
}
"""Abbreviations that a newcomer knows, or need not know."""


def test_a_newcomer_meets_no_word_before_its_explanation() -> None:
    text = "\n".join(Page(path).prose for path in PATH)
    met = []
    for word in (word for term in glossary() for word in names_of(term)):
        if first := re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", text, re.I):
            met.append(word)
            # Where a word is explained, it is in italics; or the glossary explains it.
            around = text[first.start() - 1 : first.end() + 10]
            assert re.match(r"\*.+\*|\[.+\]\(glossary", around), around
    assert set(met) >= {"worker", "center", "exchange", "pull", "difference", "group", "τ", "ρ"}


def glossary() -> list[str]:
    return re.findall(r"^(\S.*)\n  \S", Page("docs/glossary.md").text, re.M)


def names_of(term: str) -> list[str]:
    """The letters or the word that an entry of the glossary is about."""
    first, *others = term.split(", ")
    return [first, *(other for other in others if len(other) == 1)]


def test_a_newcomer_meets_no_abbreviation_before_its_words() -> None:
    text = "\n".join(Page(path).prose for path in PATH)
    for short in set(re.findall(r"\b[A-Z]{3,}\b(?!\.)", text)) - KNOWN:
        at = text.index(short)
        assert text[at - 1] == "(" or text[at:].startswith(f"{short} for short"), short


class Small(lightning.pytorch.Trainer):
    """What an example makes, but for as many workers and steps as a test has."""

    def __init__(self, **options: Any) -> None:
        few = {"devices": 2, "num_nodes": 1, "accelerator": "cpu", "max_steps": 20}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        super().__init__(**{**options, **few, **quiet})


def run_examples(rank: int, page: Page, folder: Path) -> None:
    os.chdir(folder)
    lightning.pytorch.Trainer = Small
    names = {"model": BoringModel(), "datamodule": BoringDataModule()}
    for number, example in enumerate(page.code("python"), 1):
        exec(compile(example, f"{page}, example {number}", "exec"), names)


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint:UserWarning")  # the first start
@pytest.mark.parametrize("page", [p for p in pages.everywhere() if p.code("python")], ids=str)
def test_the_examples_of_a_page_run(page: Page, tmp_path: Path) -> None:
    run_workers(run_examples, page, tmp_path, workers=2)


@pytest.mark.parametrize("page", [p for p in pages.everywhere() if p.commands()], ids=str)
def test_the_commands_of_a_page_are_understood(page: Page) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for script, arguments in page.commands():
            source = (ROOT / "scripts" / f"{script}.py").read_text()
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            options -= {"--config-dir"}  # Hydra's
            assert all(f'"{option}"' in source for option in options), (script, options)
            if "hydra.main" in source:
                if "--config-dir" in arguments:  # the choices are in a folder of the reader's
                    continue
                if any(lacks(plugin) for word, plugin in PLUGINS.items() if word in arguments):
                    continue
                for overrides in jobs(replace_whole(arguments)):
                    require_understood(script, overrides)


@cache  # some commands are on several pages
def require_understood(script: str, overrides: tuple[str, ...]) -> None:
    compose(script, overrides=[*overrides])


PLUGINS = {
    "hparams_search=optuna": "hydra_optuna_sweeper",
    "launcher=joblib": "hydra_joblib_launcher",
    "launcher=slurm": "hydra_submitit_launcher",
}
"""Choices that need a plugin of Hydra."""


def lacks(plugin: str) -> bool:
    """Whether it is not installed here."""
    return not find_spec("hydra_plugins") or not find_spec(f"hydra_plugins.{plugin}")


def jobs(arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job of a sweep, or of the only one."""
    parsed = OverridesParser.create().parse_overrides([word for word in arguments if "=" in word])
    return list(product(*map(values_of, parsed)))


def values_of(override: Override) -> list[str]:
    """What one override sets in each job; a search's interval by its start."""
    if override.is_interval_sweep():
        return [f"{override.key_or_group}={override.value().start}"]
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
