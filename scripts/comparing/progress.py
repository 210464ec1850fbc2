"""How far jobs are, and how long the rest will take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from comparing.result import Job


class Progress:
    """Judges how long jobs will take by those that are done.

    Args:
        done: jobs that earlier runs did, and their seconds.
        work: of a job, in any unit: of two jobs that differ in it alone, the one with twice as much
            takes twice as long. By default its hosts, which share the processors.
        at_once: how many jobs run side by side with a job, itself included.
    """

    def __init__(
        self,
        done: Iterable[tuple[Job, float]] = (),
        *,
        work: Callable[[Job], float] = lambda job: job.hosts,
        at_once: Callable[[Job], int] = lambda _: 1,
    ) -> None:
        self._done = list(done)
        self._work, self._at_once = work, at_once
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def end(self, job: Job, seconds: float, left: Sequence[Job]) -> str:
        """A job is done; how far all are.

        Args:
            job: that is done.
            seconds: that it took.
            left: those that are not done.
        """
        self._done.append((job, seconds))
        number = f"{len(self._done)}/{len(self._done) + len(left)}"
        if not left:
            return f"[{number}]"
        rest = sum(self.expected(each) / self._at_once(each) for each in left)
        # Nothing tells how much longer a job takes on a network that no job was on yet.
        is_known = {each.setting for each in left} <= {each.setting for each, _ in self._done}
        return f"[{number}, {'about' if is_known else 'more than'} {_told(rest)} left]"

    def expected(self, job: Job) -> float:
        """Seconds that a job will take, by those that are most like it."""
        for kind in (
            lambda each: (each.contender, each.tau, each.setting, each.tuning),
            lambda each: (each.contender, each.setting),
            lambda each: each.contender,
            lambda _: None,
        ):
            alike = [(each, s) for each, s in self._done if kind(each) == kind(job)]
            if alike:
                per_work = statistics.fmean(s / self._work(each) for each, s in alike)
                return self._work(job) * per_work
        return 0.0


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
