"""What processes that run tests do: xdist's workers, or the only one.

Each test finds this process as the one before did, or fails.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import cheap_forks
import pytest
import staying
import tiers
import torch
from processes import Forked

from lightning_easgd.strategy import local_server

ROOT = Path(__file__).parents[2]
TASKS, FILES = "/proc/self/task", "/proc/self/fd"
ENDED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Lightning's advice on num_workers, logging intervals and samplers, which tests do not follow.
    # In pyproject.toml it would have xdist's parent import torch for its class.
    config.addinivalue_line(
        "filterwarnings", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
    )
    gc.disable()  # until all is imported: a fifth of the time went to look for garbage in it
    # One thread: workers are forked from this process, and a fork does not survive OpenMP's.
    torch.set_num_threads(1)
    cheap_forks.remember_packages()
    cheap_forks.remember_that_there_is_no_gpu()
    cheap_forks.remember_configurations()
    cheap_forks.wait_with_fewer_looks()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers.mark(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.set_threshold(700, 10, 10)  # Python's own, in xdist's workers too; see sitecustomize.py
    gc.enable()
    forking = [item for item in session.items if item.get_closest_marker("multiprocess")]
    cheap_forks.keep_memory_shared(len(forking))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[ENDED] = tiers.ended_processes()
    staying.patching = "monkeypatch" in getattr(item, "fixturenames", ())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail a test that started processes, though its tier has none."""
    yield
    unseen = tiers.ended_processes() > item.stash[ENDED] and not item.get_closest_marker(
        "multiprocess"
    )
    assert not unseen, (
        "This test starts processes, which its code does not show: "
        "decorate it with pytest.mark.multiprocess."
    )


def pytest_sessionfinish() -> None:
    staying.end()


@pytest.fixture
def gpus() -> int:
    """How many GPUs there are; a test that asks is skipped where there are none."""
    if not torch.cuda.device_count():
        pytest.skip("needs a CUDA GPU: run pytest on a machine with one and a CUDA build of torch")
    return torch.cuda.device_count()


@pytest.fixture(scope="module")
def forked_server() -> Iterator[None]:
    """Worker 0 forks its server. test_local_server.py has those that start as users' do."""
    known = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_server, "subprocess", known)
        yield


def children() -> set[str]:
    """Processes that this one started and has not waited for, where the kernel tells."""
    found: set[str] = set()
    for task in os.listdir(TASKS):
        with suppress(OSError), open(f"{TASKS}/{task}/children") as file:
            found |= set(file.read().split())  # OSError: of a thread that has ended meanwhile
    return found - {str(resource_tracker._resource_tracker._pid)}  # stays, for semaphores


def sockets() -> set[str]:
    """Sockets that this process holds, and with them its ports."""
    found = set()
    for file in os.listdir(FILES):
        with suppress(OSError):  # closed meanwhile
            found.add(os.readlink(f"{FILES}/{file}"))
    return {link for link in found if link.startswith("socket:")}


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail on processes, ports, threads, variables or files that a test leaves behind."""
    variables, threads, ports = set(os.environ), set(threading.enumerate()), sockets()
    files, processes = set(os.listdir(ROOT)), children()
    yield
    assert {str(each.pid) for each in multiprocessing.active_children()} <= staying.running()
    assert children() - staying.running() <= processes
    until = time.monotonic() + 10
    while not sockets() <= ports and time.monotonic() < until:
        time.sleep(0.01)  # gRPC's threads close theirs a moment later
    assert sockets() <= ports
    by_imports = {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}  # scikit-learn's
    assert set(os.environ) - variables - by_imports <= {"PYTEST_CURRENT_TEST"}
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)  # those of a data loader that is no more end by themselves
        assert not thread.is_alive()
    assert set(os.listdir(ROOT)) - files <= {".pytest_cache", ".hypothesis"}
