"""Fixtures of the tests of scripts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


def is_left(name: str) -> bool:
    """Whether nobody will remove a namespace any more: neither this process nor one that runs."""
    found = re.fullmatch(r"emulated-(\d+)-[0-9a-f]+-\w+", name)
    return bool(found) and (int(found[1]) == os.getpid() or not Path("/proc", found[1]).exists())


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail on network namespaces and interfaces that a test leaves behind."""
    before, links = namespaces(), interfaces()
    yield
    assert not {name for name in namespaces() - before if is_left(name)}
    assert not {link for link in interfaces() - links if link.startswith(("eth", "port", "bridge"))}
