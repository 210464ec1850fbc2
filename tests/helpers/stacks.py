"""Where forked processes are when a test has waited too long for them."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ASKED = signal.SIGUSR2
_ANSWER_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
"""Who writes, writes on within it."""
_ANSWERS = tempfile.TemporaryFile("w+")  # noqa: SIM115  all forks write to it


def be_ready() -> None:
    """Have this process, and all that are forked from it, write their stacks when asked.

    A trainer that ends takes faulthandler's place from it, and puts back what Python knows of.
    """
    faulthandler.unregister(_ASKED)
    signal.signal(_ASKED, lambda *_: faulthandler.dump_traceback(_ANSWERS))
    faulthandler.register(_ASKED, _ANSWERS)


def of_forks() -> str:
    """The stacks of what was forked from this process, and from that; empty but on Linux."""
    for process in _forked_from(os.getpid()):
        print(f"\nProcess {process}:", file=_ANSWERS, flush=True)
        before = _size()
        with suppress(ProcessLookupError):
            os.kill(process, _ASKED)
            _await_more_than(before)
    _ANSWERS.seek(0)
    told = _ANSWERS.read()
    _ANSWERS.seek(0)
    _ANSWERS.truncate()
    return told


def _await_more_than(size: int) -> None:
    until, last = time.monotonic() + _ANSWER_SECONDS, size
    while time.monotonic() < until:
        time.sleep(_PAUSE_SECONDS)
        if size < last == _size():
            return
        last = _size()


def _size() -> int:
    return os.fstat(_ANSWERS.fileno()).st_size


def _forked_from(parent: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended
            known = dict(line.split(":\t", 1) for line in path.read_text().splitlines())
            if int(known["PPid"]) == parent:
                child = int(known["Pid"])
                if int(known["SigCgt"], 16) >> (_ASKED - 1) & 1:  # not another program
                    yield child
                yield from _forked_from(child)
