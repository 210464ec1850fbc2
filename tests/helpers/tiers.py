"""Which tests are ``multiprocess``, ``slow`` and ``gpu``; these markers set themselves.

Before a test runs, its code tells whether it starts processes: the test, its fixtures and
parameters, and all functions of tests and scripts that they name. Afterwards the kernel tells, and
a test fails that started processes unseen; that one needs its marker by hand.
"""

from __future__ import annotations

import inspect
import multiprocessing
import resource
import subprocess
import types
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from forking import Workers

TESTS = Path(__file__).parents[1]
OURS = (TESTS, TESTS.parent / "scripts")
STARTERS = (subprocess, subprocess.Popen, multiprocessing.get_context, Workers)
SLOW = TESTS / "slow.txt"
"""The tests that take over 2 s on 2 quiet cores, one in a line; see unmarked.

Those that share what takes so long go together.
"""
SECONDS = 2
NEVER_SLOW = "tests/test_golden.py"
"""What every push should see, however long it takes."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Give every test the markers of its tiers."""
    slow = set(SLOW.read_text().split())
    for item in items:
        if any(map(_starts, parts(item))):
            item.add_marker("multiprocess")
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker("slow")
        if "gpus" in item.fixturenames:
            item.add_marker("gpu")


def parts(item: Any) -> list[Any]:
    """The function of a test, its fixtures, and its parameters."""
    fixtures = [
        each.func for found in item._fixtureinfo.name2fixturedefs.values() for each in found
    ]
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [item.obj, *fixtures, *parameters]


def starts_processes(*values: Any) -> bool:
    """Whether any of these, or what they name, starts processes."""
    seen: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        if any(value is starter for starter in STARTERS):
            return True
        if id(value) not in seen and id(value) not in _STARTS_NONE:
            seen[id(value)] = value
            left.extend(_named_by(value))
    _STARTS_NONE.update(seen)  # nor does any that they name
    return False


_STARTS_NONE: dict[int, Any] = {}
"""What was found to start none, by identity: thousands of tests name the same."""


def _starts(value: Any) -> bool:
    """As :func:`starts_processes`, but once for all tests that have a function in common."""
    return _function_starts(value) if inspect.isfunction(value) else starts_processes(value)


_function_starts = cache(starts_processes)


def _named_by(value: Any) -> Iterator[Any]:
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield value.__func__
    elif isinstance(value, property):
        yield value.fget
    elif inspect.isclass(value) and _is_ours(value):
        yield from (*value.__bases__, *vars(value).values())
    elif inspect.isfunction(value) and _is_ours(value):
        yield from (cell.cell_contents for cell in value.__closure__ or ())
        names = {name for code in _codes(value.__code__) for name in code.co_names}
        found = [value.__globals__[name] for name in names if name in value.__globals__]
        yield from found
        for module in filter(inspect.ismodule, found):
            yield from (getattr(module, name) for name in names if hasattr(module, name))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _is_ours(value: Any) -> bool:
    try:
        return _lies_in_ours(inspect.getfile(value))
    except (TypeError, OSError):
        return False


@cache
def _lies_in_ours(path: str) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in OURS)


def ended_processes() -> int:
    """Grows with every process that this one started and waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def unmarked(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The tests that took as long as slow ones, and are none; said at the end of every run."""
    took: dict[str, float] = {}
    for report in reports:
        if "slow" not in report.keywords:
            took[report.nodeid] = took.get(report.nodeid, 0.0) + report.duration
    long = [name for name in took if took[name] > SECONDS and not name.startswith(NEVER_SLOW)]
    return [f"{took[name]:.0f} s  {name}" for name in long]
