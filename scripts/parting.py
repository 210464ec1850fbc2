"""Workers end with the process that started them, also if that is killed.

Linux sends a signal to the children of a process that ends. Elsewhere, and for a worker that does
not heed it, a pipe does: its one end closes with the process, whichever way that ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

_GRACE_SECONDS = 60.0
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with(parent: int, number: signal.Signals) -> None:
    """Have this process, a child of ``parent``, sent a signal when the parent ends."""
    if _prctl is not None:
        _prctl(_SET_DEATH_SIGNAL, int(number))
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), number)


def leave_with_parent() -> None:
    """End this process, one of multiprocessing's, with its parent: by SIGTERM, then by force."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid, signal.SIGTERM)
    threading.Thread(target=_end_after, args=(parent,), name="lifeline", daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    print("What started this worker is gone; it ends.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
