"""docs/errors.md has every error that a user of the package can meet, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pages import Page

import lightning_easgd
from lightning_easgd.strategy.unsupported import UNSUPPORTED
from lightning_easgd.strategy.validation import REFUSED

PACKAGE = Path(lightning_easgd.__file__).parent
PAGE = PACKAGE.parent / "docs" / "errors.md"
KINDS = {
    *("ValueError", "TypeError", "RuntimeError", "MisconfigurationException"),
    *("ExchangeError", "NonFiniteError", "CheckpointError"),
}
CAUGHT = {
    "it is cut short",
    "what was sent is no plain data (…)",
    "a shape is none",
    "a tensor is cut short",
    "A tensor with … and … cannot be sent.",
    "it lacks …",
}
"""What others catch, and put into a message of their own."""


def texts(node: ast.expr) -> str:
    """A message, with … for what is known only when it is raised; empty if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(texts, node.values))
    return "…" if isinstance(node, ast.FormattedValue) else ""


@cache
def messages() -> frozenset[str]:
    return frozenset(_messages())


def _messages() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        if "workloads" in path.parts:  # what the scripts train
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[said, *_])):
                    if kind in KINDS:
                        yield texts(said)
                case ast.FunctionDef(name="objection"):
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Return) and inner.value is not None:
                            yield texts(inner.value)
                case ast.Call(func=ast.Name(id="_same"), args=[_, said, _]):
                    yield f"{texts(said)} ("


@cache
def entries() -> list[str]:
    found = re.findall(r"^(`{1,2})(?!`)(.+?)\1\n: ", PAGE.read_text(), re.M)
    return [entry.strip() for _, entry in found]


def begins_with(entry: str, message: str) -> bool:
    pattern = ".+?".join(map(re.escape, entry.split("…")))
    return re.match(pattern, " ".join(message.split())) is not None


def test_every_message_has_its_entry() -> None:
    found = {said for said in messages() if said.strip("… (.:)")} - CAUGHT
    assert len(found) > 100
    missing = sorted(
        said for said in found if not any(begins_with(entry, said) for entry in entries())
    )
    assert not missing, "\n".join(missing)


def test_every_entry_is_of_a_message() -> None:
    assert len(entries()) == len(set(entries()))
    for entry in entries():
        assert len(entry.replace("…", "")) > 8, entry
        assert any(begins_with(entry, said) for said in messages()), entry


def test_the_tables_are_those_that_the_code_checks() -> None:
    pytest.importorskip("IPython", reason='pip install -e ".[docs]"')  # which shows the tables
    names: dict[str, Any] = {}
    shown = ""
    for cell in Page("docs/errors.md").code("{code-cell} python3"):
        exec(cell.removeprefix(":tags: [remove-input]\n"), names)
        shown += "\n".join(names["lines"])
    assert all(entry.because in shown for entry in UNSUPPORTED)
    assert all(f"`{entry.option}`" in shown and entry.values in shown for entry in REFUSED)


def test_what_is_caught_is_raised() -> None:
    assert messages() >= CAUGHT
