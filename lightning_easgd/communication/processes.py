"""Processes of this machine, and whether they are gone.

A killed process may leave its connections behind. What it forked holds them open, such as the
processes of a data loader. So workers on one machine look at each other's processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_ENDED = ("Z", "X", "x")
_STATE, _START_TIME = 0, 19  # in /proc/PID/stat, behind the command's name


@dataclass(frozen=True)
class Process:
    """A process, as the others of its machine know it."""

    machine: str
    """Its machine since that was started, or the container in it."""
    number: int
    started: str
    """When; a number is used again."""

    def is_gone(self) -> bool:
        """Whether it has ended, also if nobody has waited for it; asked on its machine."""
        try:
            state, started = _state_of(self.number)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False  # not known
        return state in _ENDED or started != self.started


def this_process() -> Process | None:
    """Of the caller; None where the kernel does not tell, which Linux does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        inside = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
        machine = " ".join([boot, *inside])
        return Process(machine, os.getpid(), _state_of(os.getpid())[1])
    except OSError:
        return None


def _state_of(number: int) -> tuple[str, str]:
    """Its state, and when it was started."""
    text = Path(f"/proc/{number}/stat").read_text(errors="replace")
    fields = text.rpartition(")")[2].split()
    return fields[_STATE], fields[_START_TIME]
