"""What runs now, what it found, and how long the rest will take."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from benchmarking.plan import Job


class Progress:
    """Prints a line per job, and judges how long the others will take by those that are done.

    Args:
        jobs: all that are to be run, in order.
        done: jobs that earlier runs did.
        stream: where to print.
    """

    def __init__(self, jobs: Sequence[Job], done: int = 0, stream: TextIO | None = None) -> None:
        self._left = list(jobs)
        self._total = done + len(jobs)
        self._stream = stream or sys.stdout
        self._seconds: dict[str, list[float]] = {}
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def begin(self, job: Job) -> None:
        """A job starts; a terminal shows which."""
        self._job_began = time.monotonic()
        if self._stream.isatty():
            print(f"{self._head(job)} ...", end="\r", file=self._stream, flush=True)

    def end(self, job: Job, found: str) -> None:
        """A job is done.

        Args:
            job: the first of those left.
            found: to be told about it.
        """
        self._seconds.setdefault(_kind(job), []).append(time.monotonic() - self._job_began)
        line = f"{self._head(job)}: {found}"
        self._left.remove(job)
        if self._left:
            line += f"; {_told(self.expected(self._left))} left"
        print(line, file=self._stream, flush=True)

    def expected(self, jobs: Sequence[Job]) -> float:
        """Seconds that jobs will take: as long as their kind, else as all, did so far."""
        all_kinds = [seconds for known in self._seconds.values() for seconds in known]
        usual = statistics.fmean(all_kinds) if all_kinds else 0.0
        return sum(
            statistics.fmean(self._seconds[_kind(job)]) if _kind(job) in self._seconds else usual
            for job in jobs
        )

    def _head(self, job: Job) -> str:
        number = self._total - len(self._left) + 1
        return (
            f"[{number}/{self._total}] {job.setting}, repetition {job.repetition + 1}:"
            f" {job.contender}"
        )


def _kind(job: Job) -> str:
    return f"{job.contender}, {job.setting}"


def _told(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
