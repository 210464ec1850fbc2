"""Fixtures of the tests of scripts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail on network namespaces and interfaces that a test leaves behind."""
    before, links = namespaces(), interfaces()
    yield
    # Another session's may come and go.
    left = {name for name in namespaces() - before if name.startswith("emulated-")}
    assert not left
    assert not {link for link in interfaces() - links if link.startswith(("eth", "port", "bridge"))}
