"""What one training run of a contender found, as it stands in a line of results.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from comparing.networks import Setting
from comparing.statistics import percentile


@dataclass(frozen=True)
class Job:
    """A contender's turn."""

    contender: str
    tau: int | None
    """Optimizer steps between two exchanges; None if the contender has no such period."""
    rate: float | None
    """Learning rate; None: the module's own."""
    seed: int
    network: str | None = None
    """Between emulated hosts, as 100mbit; "cluster" on a real one; None: this machine alone."""
    tuning: bool = False
    """Whether it only chooses a learning rate: shorter, or without the network."""
    hosts: int = 0
    """Workers; each is on a host of its own where hosts are emulated."""
    stall: float = 0.0
    """Seconds that every worker stalls at random, once in 16 steps on average."""
    slow: float = 1.0
    """How many times as long as the others' the steps of the last worker take."""

    @property
    def setting(self) -> Setting:
        """Where it is done."""
        return Setting(self.network, self.hosts, self.stall, self.slow)

    def __str__(self) -> str:
        period = "" if self.tau is None else f", τ = {self.tau}"
        rate = "" if self.rate is None else f", η = {self.rate:g}"
        network = "" if self.network is None else f", {self.network}"
        tuning = ", tuning" if self.tuning else ""
        return f"{self.contender}{period}{rate}, seed {self.seed}{network}{tuning}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Point:
    """The delivered model, the center where there is one, at a moment of training."""

    seconds: float
    """Of training since the first step, on worker 0; tests do not count."""
    step: int
    """Optimizer steps of a worker."""
    samples: int
    """Of all workers."""
    sent_bytes: float | None = None
    """By a worker, in the mean, tests left out; None if nobody counts them."""
    score: float | None = None
    """On the test data: accuracy, of 1, or another number that the module logs in validation; None:
    it was not finite."""
    distance: float | None = None
    """Mean over workers of ‖x - c‖ / ‖c‖ at the latest exchange; None if nobody counts it."""


@dataclass(frozen=True)
class WorkerTime:
    """Where the training time of a worker went."""

    host: str
    """Name of the machine, or of the emulated host."""
    seconds: float
    """Of training, tests left out."""
    waited: float | None = None
    """Of these, waited for exchanges; None: nobody can tell, as under DDP, whose waits are
    inside of its backward pass."""
    hidden: float | None = None
    """That exchanges took behind steps, besides what was waited; None likewise."""
    step_seconds: float | None = None
    """Of a step while no exchange is under way, in the mean; None likewise."""

    @property
    def computing(self) -> float | None:
        """Of the time of training, what was not waited."""
        return None if self.waited is None else self.seconds - self.waited


@dataclass(frozen=True)
class Speed:
    """How fast a contender trains, measured over some steps."""

    samples_per_second: float
    """Of all workers together: by the time of the slowest where exchanges keep them together, else
    the sum of what each has by its own time."""
    bytes_per_step: float
    """Sent by a worker, counted on the interface, headers and acknowledgements included."""
    bytes_to_ring: float | None
    """By how much that is more than an fp32 ring all-reduce of all parameters every period."""
    period: int | None
    """Steps between two exchanges in the end; None without exchanges."""
    step_p50: float
    step_p95: float
    wait_p50: float | None
    """Seconds that a worker waited for one exchange; None if nothing counted them."""
    wait_p95: float | None
    peak_bytes: int
    """Memory of the worker that needed most, besides what its process began with."""
    parameters: int
    steps: int
    """Steps that were measured."""

    @classmethod
    def of(cls, workers: Sequence[Mapping[str, Any]]) -> Speed:
        """From the measurements of all workers, :class:`comparing.meter.Measurement` each."""
        steps, parameters = workers[0]["steps"], workers[0]["parameters"]
        slowest = max(worker["seconds"] for worker in workers)
        # By rates, for workers that wait for nobody are measured at different times.
        seconds = [slowest if worker["coupled"] else worker["seconds"] for worker in workers]
        samples_per_second, bytes_per_second = (
            sum(worker[name] / each for worker, each in zip(workers, seconds, strict=True))
            for name in ("samples", "sent_bytes")
        )
        sent = bytes_per_second / sum(steps / each for each in seconds)
        period = workers[0]["period"]
        ring = 2 * (len(workers) - 1) / len(workers) * 4 * parameters
        step_seconds = [s for worker in workers for s in worker["step_seconds"]]
        waits = [s for worker in workers for s in worker["waits"] or []]
        return cls(
            samples_per_second=samples_per_second,
            bytes_per_step=sent,
            period=period,
            bytes_to_ring=None if period is None else sent * period / ring,
            step_p50=percentile(step_seconds, 50),
            step_p95=percentile(step_seconds, 95),
            wait_p50=percentile(waits, 50) if waits else None,
            wait_p95=percentile(waits, 95) if waits else None,
            peak_bytes=max(worker["peak_bytes"] for worker in workers),
            parameters=parameters,
            steps=steps,
        )


@dataclass(frozen=True)
class Result:
    """What one job found. Of what has not come to an end or diverged, much is None."""

    contender: str
    tau: int | None
    rate: float | None
    seed: int
    network: str | None = None
    hosts: int = 0
    """Workers; each is on a host of its own where hosts are emulated."""
    tuning: bool = False
    """Whether it only chose a learning rate, and is no result of its own."""
    stall: float = 0.0
    """Seconds that every worker stalls at random, once in 16 steps on average."""
    slow: float = 1.0
    """How many times as long as the others' the steps of the last worker take."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The contender's configuration and the workload's, by which later runs know them again."""
    job_seconds: float = 0.0
    """From the start of its processes to their end."""
    error: str | None = None
    """Why the job failed, which is not what diverging is called; None if it did not."""
    diverged: str | None = None
    """How training diverged; None if it did not."""
    score: float | None = None
    """Of the delivered model on the test data, as a point's; None if training diverged."""
    loss: float | None = None
    """Mean training loss of the delivered model; None if training diverged, or nobody asked."""
    seconds: float | None = None
    """Of training, on worker 0; tests left out."""
    steps: int | None = None
    """Optimizer steps of a worker."""
    samples: int | None = None
    """That all workers trained on."""
    sent_bytes: float | None = None
    """By a worker, in the mean; None if nobody counts them."""
    ddp_bytes: float | None = None
    """Likewise, had gradients been averaged at every step in full precision."""
    restarts: int = 0
    """How often a worker with weights that were not finite began again at the center."""
    points: tuple[Point, ...] = ()
    """In order; the last is the delivered model."""
    workers: tuple[WorkerTime, ...] = ()
    """In rank order."""
    link_rate: float | None = None
    """Bits per second that were measured between two hosts before this job; None: not measured."""
    speed: Speed | None = None
    """Where only speed was measured."""

    @property
    def job(self) -> Job:
        """What found it."""
        return Job(**{each.name: getattr(self, each.name) for each in fields(Job)})

    @property
    def setting(self) -> Setting:
        """Where it was found."""
        return self.job.setting

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def reached(self, target: float, *, lower: bool = False) -> Point | None:
        """The first point with a score at least as good; None: it did not reach it.

        Args:
            target: a score.
            lower: whether lower ones are better.
        """
        sign = -1 if lower else 1
        known = [point for point in self.points if point.score is not None]
        return next((p for p in known if sign * (p.score or 0.0) >= sign * target), None)

    @classmethod
    def of(cls, job: Job, settings: Mapping[str, Any], job_seconds: float, **found: Any) -> Result:
        """Of a job, with what it found as further fields."""
        return cls(**asdict(job), settings=settings, job_seconds=job_seconds, **found)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of :meth:`to_json`."""
        points = tuple(Point(**each) for each in values["points"])
        workers = tuple(WorkerTime(**each) for each in values["workers"])
        speed = values["speed"] and Speed(**values["speed"])
        return cls(**{**values, "points": points, "workers": workers, "speed": speed})
