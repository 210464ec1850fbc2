"""What jobs found, as JSON lines that a later run goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparing.speed_plan import Job, Setting
from comparing.statistics import percentile


@dataclass(frozen=True)
class Result:
    """What one job found: one contender in one repetition."""

    network: str
    hosts: int
    stall: float
    contender: str
    repetition: int
    samples_per_second: float
    """Of all workers together, by the time of the slowest."""
    bytes_per_step: float
    """Sent by a worker, counted on the interface, headers and acknowledgements included."""
    bytes_to_ring: float | None
    """By how much that is more than an fp32 ring all-reduce of all parameters every period."""
    period: int | None
    """Steps between two exchanges in the end; None without exchanges."""
    step_p50: float
    step_p95: float
    wait_p50: float | None
    """Seconds that a worker stood still for one exchange; None if nothing counted them."""
    wait_p95: float | None
    peak_bytes: int
    """Memory of the worker that needed most, besides what its process began with."""
    accuracy: float | None
    parameters: int
    steps: int
    """Steps that were measured."""
    job_seconds: float
    """Time of the whole job, set-up included."""

    @property
    def setting(self) -> Setting:
        """Where it was found."""
        return Setting(self.network, self.hosts, self.stall)

    @property
    def job(self) -> Job:
        """What found it."""
        return Job(self.setting, self.contender, self.repetition)

    @classmethod
    def of(
        cls,
        job: Job,
        workers: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        job_seconds: float,
    ) -> Result:
        """From the measurements of all workers.

        Args:
            job: what was run.
            workers: a :class:`comparing.meter.Measurement` each, as plain values.
            batch_size: samples in a step of one worker.
            job_seconds: time of the whole job.
        """
        steps, parameters = workers[0]["steps"], workers[0]["parameters"]
        sent = sum(worker["sent_bytes"] for worker in workers) / len(workers) / steps
        period = workers[0]["period"]
        ring = 2 * (len(workers) - 1) / len(workers) * 4 * parameters
        step_seconds = [s for worker in workers for s in worker["step_seconds"]]
        waits = [s for worker in workers for s in worker["waits"] or []]
        slowest = max(worker["seconds"] for worker in workers)
        return cls(
            **asdict(job.setting),
            contender=job.contender,
            repetition=job.repetition,
            samples_per_second=len(workers) * batch_size * steps / slowest,
            bytes_per_step=sent,
            period=period,
            bytes_to_ring=None if period is None else sent * period / ring,
            step_p50=percentile(step_seconds, 50),
            step_p95=percentile(step_seconds, 95),
            wait_p50=percentile(waits, 50) if waits else None,
            wait_p95=percentile(waits, 95) if waits else None,
            peak_bytes=max(worker["peak_bytes"] for worker in workers),
            accuracy=workers[0]["accuracy"],
            parameters=parameters,
            steps=steps,
            job_seconds=job_seconds,
        )


class Results:
    """The results of a folder, those of earlier runs first.

    Args:
        folder: where results.jsonl and workload.json are or will be.
        workload: what all results of a folder have in common.

    Raises:
        ValueError: the folder's results are of another workload.
    """

    def __init__(self, folder: Path, workload: Mapping[str, Any]) -> None:
        self._path = folder / "results.jsonl"
        self._workload = dict(workload)
        self._found = []
        if self._path.exists():
            self._check()
            lines = self._path.read_text().splitlines()
            self._found = [Result(**json.loads(line)) for line in lines]

    @property
    def _workload_path(self) -> Path:
        return self._path.with_name("workload.json")

    def _check(self) -> None:
        before = json.loads(self._workload_path.read_text())
        names = sorted({*before, *self._workload})
        other = [name for name in names if before.get(name) != self._workload.get(name)]
        if other:
            raise ValueError(
                f"{self._path} is of another workload: {', '.join(other)} differ(s). Set what it"
                " was, or another hydra.run.dir."
            )

    def __iter__(self) -> Iterator[Result]:
        return iter(self._found)

    def __contains__(self, job: Job) -> bool:
        return any(result.job == job for result in self._found)

    def add(self, result: Result) -> None:
        """Append one, to the file too."""
        self._workload_path.write_text(json.dumps(self._workload, indent=2))
        with self._path.open("a") as file:
            print(json.dumps(asdict(result)), file=file)
        self._found.append(result)
