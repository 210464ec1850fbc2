"""Workers end with the process that started them, also if that is killed.

Linux sends a signal to the children of a process that ends. Elsewhere, and for a worker that does
not heed it, a pipe does: its one end closes with the process, whichever way that ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

_VARIABLE = "EASGD_LIFELINE"
_GRACE_SECONDS = 60.0
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Lifeline:
    """What a process gives to those that it starts, within a ``with`` block."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        self._theirs, self._mine = os.pipe()
        self.variables = {_VARIABLE: str(self._theirs)}
        """For their environments."""
        self.passed = [self._theirs]
        """Descriptors that they keep."""

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._theirs)
        os.close(self._mine)

    def hold(self) -> None:
        """Called in them first of all."""
        end_with(self._parent, signal.SIGTERM)


def end_with(parent: int, number: signal.Signals) -> None:
    """Have this process, a child of ``parent``, sent a signal when the parent ends."""
    if _prctl is not None:
        _prctl(_SET_DEATH_SIGNAL, int(number))
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), number)


def watch_lifeline() -> None:
    """End this process, if it is a worker, with the one that started it."""
    descriptor = os.environ.pop(_VARIABLE, None)
    if descriptor is not None:
        threading.Thread(
            target=_end_at_its_end, args=(int(descriptor),), name="lifeline", daemon=True
        ).start()


def _end_at_its_end(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written
    print("What started this worker is gone; it ends.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
