"""Who runs jobs: workers forked from this process, or hosts with a network between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from forking import Outcome, Workers, one_node
from omegaconf import DictConfig

from comparing.clusters import Cluster, ClusterError, EmulatedCluster
from comparing.networks import Setting
from comparing.result import Job, Result
from comparing.work import gathered

_POLL_SECONDS = 0.05


@dataclass
class _Running:
    settings: dict[str, Any]
    workers: Workers
    began: float = field(default_factory=time.monotonic)
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class Launcher(Protocol):
    """Runs jobs within a ``with`` block."""

    room: int
    """How many run at the same time."""

    def __enter__(self) -> Launcher: ...

    def __exit__(self, *_: object) -> None: ...

    def __len__(self) -> int: ...

    def __contains__(self, job: Job) -> bool: ...

    def start(self, job: Job, settings: Mapping[str, Any]) -> None:
        """Have a job run, if there is room."""

    def wait(self) -> Result:
        """What the next job that ends has found, or how it failed."""


class ClusterJobs:
    """One job after another on a cluster, whose link is measured before each.

    Args:
        make: the cluster; called again after a job that failed.
    """

    room = 1

    def __init__(self, make: Callable[[], Cluster]) -> None:
        self._make = make
        self._cluster: Cluster | None = None
        self._jobs: list[tuple[Job, Mapping[str, Any]]] = []

    def __enter__(self) -> ClusterJobs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.__exit__()
            self._cluster = None

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return any(job == each for each, _ in self._jobs)

    def start(self, job: Job, settings: Mapping[str, Any]) -> None:
        """Have it run as soon as it is waited for."""
        self._jobs.append((job, settings))

    def wait(self) -> Result:
        """What the job has found, or how it failed."""
        job, settings = self._jobs.pop()
        began = time.monotonic()
        try:
            if self._cluster is None:
                self._cluster = self._make().__enter__()
            began = time.monotonic()
            rate = self._cluster.link_rate()
            found = gathered(self._cluster.run(job, settings)) | {"link_rate": rate}
        except ClusterError as error:
            self.__exit__()  # hosts wait for the one that failed
            found = {"error": str(error)}
        return Result.of(job, settings, time.monotonic() - began, **found)


def emulated(
    cfg: DictConfig, setting: Setting, work: Callable[..., Any], output: Path, *, threads: int
) -> ClusterJobs:
    """Jobs on emulated hosts.

    Args:
        cfg: of the script.
        setting: of the hosts.
        work: called as ``work(job, settings, port=...)`` in every worker of a job.
        output: the folder of results, and of what hosts print.
        threads: of each worker.
    """
    timeout, logs = cfg.job_timeout, output / "logs"
    make = partial(EmulatedCluster, setting, work, logs, timeout=timeout, threads=threads)
    return ClusterJobs(make)


def sharing_gpu(rank: int, gpus: int) -> dict[str, str]:
    """Environment of a worker that sees one GPU, maybe with others, as if on a node of its own."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(gpus)]
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": str(rank)}
    return own | {"CUDA_VISIBLE_DEVICES": names[rank % gpus]}


class Jobs:
    """Jobs that run within a ``with`` block; leaving it ends those that still do.

    Args:
        work: called as ``work(job, settings)`` in every worker of a job.
        workers: of a job.
        room: how many run at the same time.
        timeout: seconds that a job may take.
    """

    def __init__(
        self, work: Callable[..., Any], *, workers: int, room: int, timeout: float
    ) -> None:
        self.room = room
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
        variables = one_node(self._workers) | {"LOCAL_WORLD_SIZE": str(self._workers)}
        workers = Workers(self._of_rank, job, settings, workers=self._workers, variables=variables)
        self._running[job] = _Running(dict(settings), workers)

    def _of_rank(self, rank: int, job: Job, settings: Mapping[str, Any]) -> Any:
        gpus = torch.cuda.device_count() if settings["workload"]["accelerator"] == "gpu" else 0
        if 0 < gpus < self._workers:
            os.environ |= sharing_gpu(rank, gpus)
        return self._work(job, settings)

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
            if error is not None or done:
                values = [running.outcomes[rank].value for rank in range(self._workers) if done]
                found = {"error": error} if error is not None else gathered(values)
                yield Result.of(job, running.settings, seconds, **found)

    def _error(self, running: _Running, seconds: float) -> str | None:
        """Of the worker that failed first; the others may have failed for want of it."""
        failed = [item for item in running.outcomes.items() if item[1].error is not None]
        if failed:
            rank, outcome = min(failed, key=lambda item: item[1].at)
            return f"worker {rank}: {outcome.trace or outcome.message}".rstrip()
        if seconds > self._timeout and len(running.outcomes) < self._workers:
            return f"not all workers were back after {self._timeout:g} s (job_timeout)"
        return None
