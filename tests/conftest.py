import multiprocessing
import os
import signal
import threading

import pytest
import torch

# One thread: workers are forked from this process, and a fork does not survive OpenMP's threads.
torch.set_num_threads(1)

# A shell that started pytest in the background made it, and all that it starts, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail on processes, threads or environment variables that a test leaves behind."""
    variables, threads = set(os.environ), set(threading.enumerate())
    yield
    assert not multiprocessing.active_children()
    by_imports = {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}  # scikit-learn's
    assert set(os.environ) - variables - by_imports <= {"PYTEST_CURRENT_TEST"}
    assert set(threading.enumerate()) <= threads
