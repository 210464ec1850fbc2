"""Jobs that run at the same time, in workers forked from this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from forking import Outcome, Workers

from comparing.job import gathered
from comparing.result import Job, Result

_POLL_SECONDS = 0.05


@dataclass
class _Running:
    settings: dict[str, Any]
    workers: Workers
    began: float = field(default_factory=time.monotonic)
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class Jobs:
    """Jobs that run within a ``with`` block; leaving it ends those that still do.

    Args:
        work: called as ``work(rank, job, settings)`` in every worker of a job.
        workers: of a job.
        timeout: seconds that a job may take.
    """

    def __init__(self, work: Callable[..., Any], workers: int, timeout: float) -> None:
        self._work = work
        self._workers = workers
        self._timeout = timeout
        self._running: dict[Job, _Running] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            running.workers.__exit__()

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, job: Job) -> bool:
        return job in self._running

    def start(self, job: Job, settings: Mapping[str, Any]) -> None:
        """Have it run, beside those that do."""
        workers = Workers(self._work, job, settings, workers=self._workers)
        self._running[job] = _Running(dict(settings), workers)

    def wait(self) -> Result:
        """What the next job that ends has found, or how it failed."""
        while True:
            for result in self._ended():
                self._running.pop(result.job).workers.__exit__()
                return result
            time.sleep(_POLL_SECONDS)

    def _ended(self) -> Iterator[Result]:
        for job, running in self._running.items():
            left = [rank for rank in range(self._workers) if rank not in running.outcomes]
            running.outcomes |= dict(running.workers.ended(left, 0))
            seconds = time.monotonic() - running.began
            error = self._error(running, seconds)
            done = len(running.outcomes) == self._workers
            if error is None and not done:
                continue
            values = [running.outcomes[rank].value for rank in range(self._workers) if done]
            found = {"error": error} if error is not None else gathered(values)
            yield Result(
                contender=job.contender,
                tau=job.tau,
                rate=job.rate,
                seed=job.seed,
                hosts=self._workers,
                settings=running.settings,
                job_seconds=seconds,
                **found,
            )

    def _error(self, running: _Running, seconds: float) -> str | None:
        """Of the worker that failed first; the others may have failed for want of it."""
        failed = [item for item in running.outcomes.items() if item[1].error is not None]
        if failed:
            rank, outcome = min(failed, key=lambda item: item[1].at)
            return f"worker {rank}: {outcome.trace or outcome.message}".rstrip()
        if seconds > self._timeout and len(running.outcomes) < self._workers:
            return f"not all workers were back after {self._timeout:g} s (job_timeout)"
        return None
