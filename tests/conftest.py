import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch

# One thread: workers are forked from this process, and a fork does not survive OpenMP's threads.
torch.set_num_threads(1)

# A shell that started pytest in the background made it, and all that it starts, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
PROCESS = Path("/proc/self")


def pytest_configure(config: pytest.Config) -> None:
    """Whatever a test starts imports what the test does: this tree, and not an installed one."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, config.getini("pythonpath")))


def children() -> set[str]:
    """Processes that this one started and has not waited for, where the kernel tells."""
    found = {pid for path in PROCESS.glob("task/*/children") for pid in path.read_text().split()}
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
    assert not multiprocessing.active_children()
    assert children() <= processes
    assert sockets() <= ports
    by_imports = {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}  # scikit-learn's
    assert set(os.environ) - variables - by_imports <= {"PYTEST_CURRENT_TEST"}
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)  # those of a data loader that is no more end by themselves
        assert not thread.is_alive()
    assert set(os.listdir(ROOT)) - files <= {".pytest_cache"}
