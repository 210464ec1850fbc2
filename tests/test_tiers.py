"""Tests find their tier: what starts processes, and what takes long."""

from __future__ import annotations

import re
import subprocess
from functools import cache, partial
from typing import Any

import pytest
import tiers
from processes import run_workers
from toy import Toy


def plain() -> str:
    return "run_workers"


def direct() -> None:
    subprocess.run(["true"])


def nested() -> Any:
    return [lambda: run_workers(plain, workers=1)]


@cache
def cached() -> Any:
    return nested()


class Holder:
    started = property(lambda self: cached())


TABLE = {"case": [partial(nested)]}


def by_table() -> Any:
    return TABLE


@pytest.mark.parametrize(
    "value", [direct, nested, cached, Holder, by_table, partial(max, key=nested)]
)
def test_what_starts_processes_is_seen_however_it_is_named(
    value: Any, request: pytest.FixtureRequest
) -> None:
    assert tiers.starts_processes(value)
    assert request.node.get_closest_marker("multiprocess")  # by its parameter


@pytest.mark.parametrize("value", [plain, Toy, partial(max, key=plain), "run_workers"])
def test_what_starts_none_is_not(value: Any) -> None:
    assert not tiers.starts_processes(value)


def test_the_kernel_counts_what_ended() -> None:
    before = tiers.ended_processes()
    assert tiers.ended_processes() == before
    direct()
    assert tiers.ended_processes() > before


def test_every_slow_test_exists_and_is_slow_only_once() -> None:
    lines = tiers.SLOW.read_text().splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        file, name = line.split("::")
        text = (tiers.TESTS.parent / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), line


def test_a_test_that_is_slow_unmarked_is_said() -> None:
    def report(name: str, seconds: float, *keywords: str, when: Any = "call") -> pytest.TestReport:
        marks = dict.fromkeys(keywords, 1)
        return pytest.TestReport(name, ("", 0, ""), marks, "passed", None, when, duration=seconds)

    reports = [report("a", 2), report("a", 1, when="setup"), report("b", 2)]
    reports += [report("c", 100, "slow"), report("tests/test_golden.py::test_a[b]", 100)]
    assert tiers.unmarked(reports) == ["3 s  a"]
