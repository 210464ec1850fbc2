"""Counters of one worker: bytes, waits, distances. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

_COUNTERS = (
    *("steps", "exchanges", "bytes_sent", "bytes_received", "bytes_inside"),
    *("exchanges_often", "bytes_often"),
    *("bytes_of_groups", "exchanges_inside", "wait_seconds", "non_finite"),
)


@dataclass
class Telemetry:
    """What the exchanges of this worker cost and found, since the start of training.

    Bytes are what a ring all-reduce and the headers move, without the network's own framing.
    """

    steps: int = 0
    """Optimizer steps taken by this worker."""
    exchanges: int = 0
    """Exchanges started, the final one included; each of a fragment of the model."""
    exchanges_inside: int = 0
    """Exchanges with centers of groups that this worker is in; none of the others."""
    exchanges_often: int = 0
    """Exchanges of the parameters that are exchanged often, which are not among the others."""
    bytes_sent: int = 0
    """Bytes this worker sent for exchanges, and for gradients where they are averaged."""
    bytes_received: int = 0
    """Bytes this worker received, likewise."""
    bytes_inside: int = 0
    """Of the bytes sent, those to workers of its own group, the outermost if there are several."""
    bytes_of_groups: list[int] = field(default_factory=list)
    """Of the bytes sent, those for exchanges with the centers of its groups, outermost first."""
    bytes_often: int = 0
    """Of the bytes sent, those for parameters that are exchanged often."""
    step_seconds: float = 0.0
    """An optimizer step of this worker, data and all, while no exchange is under way; the mean."""
    exchange_seconds: float = 0.0
    """From the start of an exchange to the arrival of its sums; the median."""
    exchange_cost_seconds: float = 0.0
    """By how much an exchange lengthens the steps that it hides behind; the mean."""
    wait_seconds: float = 0.0
    """Seconds this worker waited for an exchange."""
    consensus_distance: float = 0.0
    """‖x - c‖ / ‖c‖ of this worker at its latest exchange, before the pull."""
    tau: int = 0
    """Communication period τ in force, in optimizer steps."""
    alpha: float = 0.0
    """Moving rate α of the latest exchange (the largest, if parameter groups differ)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Options of the rule that follow a schedule, at the latest exchange that has arrived."""
    non_finite: int = 0
    """Differences left out because a worker's weights were not finite, over all workers; where
    groups have centers of their own, over those of this group, and groups without a finite one."""
    staleness: float | None = None
    """How often the center behind a server moved between this worker's getting it and the adding of
    its difference, the mean; None without a server."""
    ddp_bytes_per_step: int = 0
    """Bytes this worker would send per optimizer step if gradients were all-reduced."""
    differences_added: int = 0
    """Differences of this worker that a server has added, as far as the worker knows."""
    worker_wait_seconds: list[float] = field(default_factory=list)
    """Seconds waited by each worker in this fit, in rank order, up to the exchange before the
    latest. The worker that the others wait for is the one that waits least."""
    worker_awaited_seconds: list[float] = field(default_factory=list)
    """Seconds that each worker was waited for in this fit, in rank order. The others wait for the
    worker that waits least at an exchange, by as much as the one that waits longest waits more."""

    @property
    def bytes_between(self) -> int:
        """Of the bytes sent, those between groups; all of them if there are no groups."""
        return self.bytes_sent - self.bytes_inside

    @property
    def bytes_per_level(self) -> list[int]:
        """Bytes sent for exchanges with the center, then for those with centers of groups.

        The outermost group of this worker comes first. The sum of all is all that was sent.
        """
        return [self.bytes_sent - sum(self.bytes_of_groups), *self.bytes_of_groups]

    @property
    def ddp_bytes_sent(self) -> int:
        """Bytes this worker would have sent so far if gradients were all-reduced at every step."""
        return self.steps * self.ddp_bytes_per_step

    def count_bytes(self, moved: int, inside: int) -> None:
        """Count bytes that were sent and as many received; ``inside``: those within a group."""
        self.bytes_sent += moved
        self.bytes_received += moved
        self.bytes_inside += inside

    def count_waits(self, waited: Sequence[float]) -> None:
        """Count how long each worker has waited since the exchange before."""
        if not self.worker_wait_seconds:
            self.worker_wait_seconds = [0.0] * len(waited)
            self.worker_awaited_seconds = [0.0] * len(waited)
        for rank, seconds in enumerate(waited):
            self.worker_wait_seconds[rank] += seconds
        last = min(range(len(waited)), key=waited.__getitem__)
        self.worker_awaited_seconds[last] += max(waited) - waited[last]

    def count_staleness(self, staleness: int) -> None:
        """Count that of a difference, which the server has added."""
        self.differences_added += 1
        mean = self.staleness or 0.0
        self.staleness = mean + (staleness - mean) / self.differences_added

    def take_over_inside(self, inside: Telemetry, level: int) -> None:
        """Count what was counted at a level of groups, 0 the outermost, where it begins anew."""
        self.exchanges_inside += inside.exchanges
        self.bytes_inside += inside.bytes_sent
        self.bytes_of_groups[level] += inside.bytes_sent
        self._take_over(inside)

    def take_over_often(self, often: Telemetry) -> None:
        """Count what was counted for parameters exchanged often, where it begins anew."""
        self.exchanges_often += often.exchanges
        self.bytes_often += often.bytes_sent
        self._take_over(often)

    def _take_over(self, other: Telemetry) -> None:
        for name in ("bytes_sent", "bytes_received", "wait_seconds", "non_finite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
            setattr(other, name, 0)
        other.exchanges = 0

    def counters(self) -> dict[str, Any]:
        """What adds up over a run, to be carried on when it resumes."""
        return {name: copy(getattr(self, name)) for name in _COUNTERS}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """The inverse of :meth:`counters`."""
        for name, value in counters.items():
            setattr(self, name, copy(value))

    def metrics(self) -> dict[str, float]:
        """The numbers that are worth a curve, by name; one per worker or level has its number."""
        per_worker = ("worker_wait_seconds", "worker_awaited_seconds")
        skipped = {"steps", "ddp_bytes_per_step", "rates", "bytes_of_groups", *per_worker}
        skipped |= {"staleness", "differences_added"} if self.staleness is None else set()
        found = {name: value for name, value in vars(self).items() if name not in skipped}
        found["ddp_bytes_sent"] = self.ddp_bytes_sent
        levels = enumerate(self.bytes_per_level if self.bytes_of_groups else [])
        found |= {f"bytes_level_{level}": sent for level, sent in levels}
        for name in per_worker:
            found |= {f"{name}/{rank}": value for rank, value in enumerate(getattr(self, name))}
        return {name: float(value) for name, value in {**found, **self.rates}.items()}

    def __str__(self) -> str:
        """As a table for the terminal."""
        shown = {"steps": self.steps, **self.metrics()}
        width = max(map(len, shown))
        return "\n".join(f"{name:<{width}}  {_in_words(name, v)}" for name, v in shown.items())


def _in_words(name: str, value: float) -> str:
    if "bytes" in name:
        return f"{value / 1e6:.2f} MB"
    if "seconds" in name:
        return f"{value:.3g} s" if value >= 0.1 or not value else f"{1e3 * value:.3g} ms"
    return f"{value:g}"
