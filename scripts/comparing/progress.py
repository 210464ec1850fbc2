"""What runs now, what it found, and how long the rest will take."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable, Sequence

from comparing.result import Job


class Progress:
    """Has a line for each job, and judges how long the others will take by those that are done.

    Args:
        jobs: all that are to be run, in order.
        done: jobs that earlier runs did, and their seconds.
    """

    def __init__(self, jobs: Sequence[Job], done: Sequence[tuple[Job, float]] = ()) -> None:
        self._left = list(jobs)
        self._total = len(done) + len(jobs)
        self._done = list(done)
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def begin(self, job: Job) -> None:
        """A job starts; a terminal shows which."""
        self._job_began = time.monotonic()
        if sys.stdout.isatty():
            print(f"{self._head(job)} ...", end="\r", flush=True)

    @property
    def job_seconds(self) -> float:
        """Time since the job began that runs."""
        return time.monotonic() - self._job_began

    def end(self, job: Job, found: str) -> str:
        """A job is done; a line about it.

        Args:
            job: the first of those left.
            found: to be told about it.
        """
        self._done.append((job, self.job_seconds))
        line = f"{self._head(job)}: {found}"
        self._left.remove(job)
        if self._left:
            line += f"; {_told(self.expected(self._left))} left"
        return line

    def expected(self, jobs: Iterable[Job]) -> float:
        """Seconds that jobs will take, by those that are done: the more hosts, the longer."""
        return sum(self._expected(job) for job in jobs)

    def _expected(self, job: Job) -> float:
        contender = [each for each in self._done if each[0].contender == job.contender]
        kind = [each for each in contender if each[0].setting == job.setting]
        per_host = [
            seconds / done.setting.hosts for done, seconds in kind or contender or self._done
        ]
        return job.setting.hosts * statistics.fmean(per_host) if per_host else 0.0

    def _head(self, job: Job) -> str:
        number = self._total - len(self._left) + 1
        where = "" if job.network is None else f"{job.setting}: "
        return f"[{number}/{self._total}] {where}{job.contender}, seed {job.seed}"


def _told(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
