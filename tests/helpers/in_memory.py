"""Workers that are threads of one process, and exchange by memory: the same engine, in seconds.

What stands in for torch.distributed is small: a gathering of headers, and sums. Each is complete
when the last worker has come to it, which then writes what all get, in rank order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.center.center import Center
from lightning_easgd.communication import AllReduce, ExchangeError, Level
from lightning_easgd.communication.progress import Progress
from lightning_easgd.exchange.assembly import assemble
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.schedules import TrainingLength
from lightning_easgd.strategy.build import make_center
from lightning_easgd.strategy.strategy import EASGDStrategy

TIMEOUT = 20.0


@dataclass
class Collective:
    """One collective of all workers: whose part is there, and whether all are."""

    parts: dict[int, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        if not self.done.wait(TIMEOUT):
            raise RuntimeError(f"only worker(s) {sorted(self.parts)} came")
        if self.abandoned:
            raise RuntimeError("another worker failed")


class Wire:
    """Matches the collectives of workers by their order, as process groups do."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.errors: list[BaseException] = []
        """What workers raised, the first one first."""
        self._lock = threading.Lock()
        self._collectives: dict[tuple[str, int], Collective] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def join(
        self, channel: str, rank: int, part: Any, complete: Callable[[list[Any]], None]
    ) -> Collective:
        """Come to this worker's next collective on a channel; the last completes it."""
        with self._lock:
            number = self._counts[channel, rank] = self._counts.get((channel, rank), -1) + 1
            collective = self._collectives.setdefault((channel, number), Collective())
            collective.parts[rank] = part
            if self.errors:
                self._abandon()
            elif len(collective.parts) == self.workers:
                complete([collective.parts[rank] for rank in range(self.workers)])
                del self._collectives[channel, number]
                collective.done.set()
        return collective

    def fail(self, error: BaseException) -> None:
        """A worker comes to no collective any more: end those that wait for it."""
        with self._lock:
            self.errors.append(error)
            self._abandon()

    def _abandon(self) -> None:
        for collective in self._collectives.values():
            collective.abandoned = True
            collective.done.set()


class InMemoryGroup:
    """What an exchange needs of a WorkerGroup."""

    backend, polls = "gloo", True

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank, self.size = wire, rank, wire.workers
        self.progress = Progress()

    def wait(
        self, work: Collective, what: str, *, poll: bool = True, patiently: bool = False
    ) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise ExchangeError(f"{what}: {error}") from error


class InMemoryAllReduce(AllReduce):
    """Headers and sums by memory."""

    def __init__(self, group: InMemoryGroup, channel: str = "") -> None:
        super().__init__(group, 2**20, level=Level(group.rank, group.size, None))
        self._channel = channel

    def _gather(self, mine: Tensor, everybody: Tensor) -> Any:
        def complete(parts: list[tuple[Tensor, Tensor]]) -> None:
            for _, rows in parts:
                rows.copy_(torch.stack([header for header, _ in parts]))

        return self.group.wire.join(
            f"headers{self._channel}", self.group.rank, (mine, everybody), complete
        )

    def sum(self, tensors: Iterable[Tensor]) -> list[Any]:
        channel = f"sums{self._channel}"
        return [self.group.wire.join(channel, self.group.rank, t, _sum_) for t in tensors]


@torch.no_grad()
def _sum_(parts: list[Tensor]) -> None:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    for part in parts:
        part.copy_(total)


@dataclass
class Worker:
    """One worker and its exchange, without a trainer."""

    rank: int
    module: Any
    optimizer: torch.optim.Optimizer
    center: Center
    exchange: Exchange
    workers: int

    def step(self, closure: Callable[[], Any]) -> None:
        """As of EASGDStrategy.optimizer_step."""

        def observed() -> Any:
            self.exchange.writes.before_closure()
            loss = closure()
            self.exchange.writes.before_step()
            return loss

        with self.exchange.step(self.optimizer):
            self.optimizer.step(observed)


def make_worker(
    wire: Wire, rank: int, module: Any, strategy: EASGDStrategy, *, steps: int
) -> Worker:
    """A worker that is about to train, as the strategy's options have it."""
    optimizer, options = module.configure_optimizers(), strategy.options
    center = make_center(module, options, rank)
    group = InMemoryGroup(wire, rank)
    exchange = assemble(
        center,
        InMemoryAllReduce(group),
        optimizers=LocalOptimizers(lambda: [optimizer]),
        rules=options.rules,
        telemetry=strategy.telemetry,
        often=InMemoryAllReduce(group, " of small parameters") if options.often else None,
    )
    options.rules.schedules.begin(TrainingLength(steps, steps))
    exchange.start_clock(0)
    return Worker(rank, module, optimizer, center, exchange, wire.workers)


def run_threads(target: Callable[..., Any], *args: Any, workers: int) -> list[Any]:
    """Run ``target(wire, rank, *args)`` in a thread for each worker; what each returned.

    Raises:
        Exception: the first that a worker raised, after which the others wait for nobody.
    """
    wire = Wire(workers)

    def work(rank: int) -> Any:
        try:
            return target(wire, rank, *args)
        except BaseException as error:
            wire.fail(error)

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(work, range(workers)))
    if wire.errors:
        raise wire.errors[0]
    return results
