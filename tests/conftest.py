import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import cheap_forks
import pytest
import staying
import tiers
import torch

# One thread: workers are forked from this process, and a fork does not survive OpenMP's threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # or a trainer without workers would set more

# A shell that started pytest in the background made it, and all that it starts, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
PROCESS = Path("/proc/self")
ENDED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Whatever a test starts imports what the test does: this tree, and not an installed one."""
    gc.disable()  # until all is imported: a fifth of the time went to look for garbage in it
    cheap_forks.remember_packages()
    cheap_forks.remember_that_there_is_no_gpu()
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*map(str, config.getini("pythonpath")), *filter(None, given)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers.mark(items)


def pytest_collection_finish(session: pytest.Session) -> None:
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests belong into tests/slow.txt; whether they do, depends on the machine."""
    found = (report for reports in terminalreporter.stats.values() for report in reports)
    slow = tiers.unmarked(each for each in found if isinstance(each, pytest.TestReport))
    if slow:
        terminalreporter.section(f"over {tiers.SECONDS} s, and not in tests/slow.txt")
        terminalreporter.write_line("\n".join(slow))


@pytest.fixture
def gpus() -> int:
    """How many GPUs there are; a test that asks is skipped where there are none."""
    if not torch.cuda.device_count():
        pytest.skip("needs a CUDA GPU: run pytest on a machine with one and a CUDA build of torch")
    return torch.cuda.device_count()


def children() -> set[str]:
    """Processes that this one started and has not waited for, where the kernel tells."""
    found: set[str] = set()
    for path in PROCESS.glob("task/*/children"):
        with suppress(OSError):  # of a thread that has ended meanwhile
            found |= set(path.read_text().split())
    return found - {str(resource_tracker._resource_tracker._pid)}  # stays, for semaphores


def sockets() -> set[str]:
    """Sockets that this process holds, and with them its ports."""
    found = set()
    for path in PROCESS.glob("fd/*"):
        with suppress(OSError):  # closed meanwhile
            found.add(os.readlink(path))
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
