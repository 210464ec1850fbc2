"""Sums over all workers, or those of a subgroup, that travel while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easgd.center.flat import bucket_slices
from lightning_easgd.communication.header import Header
from lightning_easgd.communication.subgroup import Subgroup
from lightning_easgd.communication.workers import Work, WorkerGroup


@dataclass(frozen=True)
class Payload:
    """What one worker adds to the sums: flat tensors, which are the sums' until they arrived."""

    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """By a name that is theirs in every exchange; may travel in a shorter form."""
    statistics: list[Tensor] = field(default_factory=list)
    """Travel as they are."""

    def __bool__(self) -> bool:
        return bool(self.differences)


@dataclass(frozen=True)
class Level:
    """The workers whose sums are made: all of them, or one of each group."""

    rank: int
    """This worker's number among them."""
    size: int
    """How many they are."""
    data: dist.ProcessGroup | None
    """Theirs; None if this worker is not one of them, and so never sums."""


class PendingSum:
    """A sum in flight.

    Owns the collectives until :meth:`wait` returns; until then the tensors must not be touched.

    Args:
        header: of this worker.
        header_work: gathers those of all.
        headers: where they arrive, of shape (workers, fields).
        group: the workers.
        what: it is, for messages.
    """

    def __init__(
        self,
        header: Header,
        header_work: Work,
        headers: Tensor,
        *,
        group: WorkerGroup,
        what: str,
    ) -> None:
        self.what = what
        self.parts: list[tuple[Work, bool]] = []
        """Each brings a part of the sums; and whether it can be monitored, see WorkerGroup.wait."""
        self._header = header
        self._header_work = header_work
        self._headers = headers
        self._group = group

    def headers(self, *, patiently: bool = False) -> list[Header]:
        """Wait for the headers of all workers; in rank order.

        Args:
            patiently: as long as another worker gets on.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        self._group.wait(self._header_work, self.what, patiently=patiently)
        return [self._header.unpack(values) for values in self._headers.tolist()]

    def arrived(self) -> bool:
        """Whether every tensor holds its sum, or an error was met."""
        return all(work.is_completed() for work in [self._header_work, *(w for w, _ in self.parts)])

    def wait(self) -> None:
        """Wait until every tensor holds its sum.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        for work, poll in self.parts:
            self._group.wait(work, self.what, poll=poll)


class AllReduce:
    """Sums lists of flat tensors over workers, in buckets, in the background.

    Args:
        group: all workers.
        bucket_bytes: the most that one all-reduce carries, in bytes.
        level: the workers that sum.
        control: tells the headers; None: this only joins exchanges that others begin.
        within: the subgroup whose members take part, which nothing else may go through; None: all
            workers do.
        groups: ranks of workers that take part in sums as one; none if each does by itself.
    """

    has_residual: bool = False
    """Whether a part of what is to be summed may be held back for the next exchange."""

    def __init__(
        self,
        group: WorkerGroup,
        bucket_bytes: int,
        *,
        level: Level,
        control: dist.ProcessGroup | None = None,
        within: Subgroup | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        self.group = group
        self.bucket_bytes = bucket_bytes
        self.within = within
        """The subgroup whose members take part, unless all workers do."""
        self.level = level
        self._control = control
        self.ranks = within.ranks if within else list(range(group.size))
        """Of the workers whose headers are gathered, in the order of the headers."""
        self.participants = _places(self.ranks, groups or [[rank] for rank in self.ranks])
        """Workers that take part in sums as one, or each by itself, as places in :attr:`ranks`."""
        place = self.ranks.index(group.rank)
        self.participant = next(i for i, places in enumerate(self.participants) if place in places)
        """The number, in :attr:`participants`, of that with this worker."""
        self.senders = [places[0] for places in self.participants]
        """The places of the workers whose differences are summed."""

    def start(
        self,
        payload: Payload,
        header: Header,
        *,
        last: bool = False,
    ) -> PendingSum:
        """Begin to replace each flat tensor by its sum over all workers, in place.

        All workers must bring tensors of the same sizes in the same order; the header goes first.

        Args:
            payload: of this worker.
            header: of this worker.
            last: whether what is held back, if anything, goes along.
        """
        mine = torch.tensor(header.pack(), dtype=torch.int64, device="cpu")
        headers = mine.new_empty(len(self.ranks), len(mine))
        what = f"The exchange that worker {self.group.rank} began at step {header.clock}"
        work = self._gather(mine, headers)
        pending = PendingSum(header, work, headers, group=self.group, what=what)
        if payload:
            self.join(pending, payload, last=last)
        return pending

    def join(self, pending: PendingSum, payload: Payload, *, last: bool = False) -> None:
        """Begin to sum as :meth:`start` does, in an exchange whose header has left."""
        for work in self.sum([*payload.differences.values(), *payload.statistics]):
            pending.parts.append((work, self.group.polls))

    def waits(self, device: torch.device) -> tuple[float, float]:
        """How many exchanges a value waits, on average, for its worker and the owner of its sum.

        1 if it is not held back at all.
        """
        return 1.0, 1.0

    @property
    def corrects_pull(self) -> bool:
        """Whether workers that are pulled reckon with what they hold back."""
        return False

    def add_residual_(self, differences: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times what is held back of differences to them, if workers reckon so."""

    def keep_residual(self, payload: Payload, *, last: bool = False) -> None:
        """Hold back what :meth:`join` would if workers reckon with it, and send nothing."""

    def quantize_(self, differences: Iterable[Tensor]) -> None:
        """Replace differences by what is sent of them, where the rest is not held back."""

    def agree(self, healthy: bool, checksum: Callable[[], int]) -> bool:
        """Whether the differences of all workers that take part as one are finite.

        Args:
            healthy: whether this worker's are.
            checksum: gives that of their bits, within 63.

        Raises:
            ExchangeError: those of workers that take part as one are not equal.
        """
        return healthy

    def _gather(self, mine: Tensor, everybody: Tensor) -> Work:
        rows = list(everybody.unbind())
        work = dist.all_gather(rows, mine, group=self._control, async_op=True)
        assert work is not None
        return work

    def state(self) -> dict[str, Any]:
        """What is held back, for a checkpoint of this worker."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""

    def header_bytes(self, header: Header) -> tuple[int, int]:
        """As :meth:`sum_bytes`, for headers."""
        return header.nbytes * (len(self.ranks) - 1), 0

    def sum_bytes(self, payload: Payload, *, last: bool = False) -> tuple[int, int]:
        """Bytes that this worker sends, and receives, for sums; of them, those inside its group."""
        return self.ring_bytes([*payload.differences.values(), *payload.statistics]), 0

    def ring_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that each worker sends, and receives, in ring all-reduces: 2 (p-1)/p of them."""
        payload = sum(tensor.nbytes for tensor in tensors)
        return 2 * (self.level.size - 1) * payload // self.level.size

    def sum(self, tensors: Iterable[Tensor]) -> list[Work]:
        """Start to sum flat tensors in place."""
        works: list[Work] = []
        for tensor in tensors:
            for bucket in bucket_slices(tensor.numel(), tensor.itemsize, self.bucket_bytes):
                work = dist.all_reduce(tensor[bucket], group=self.level.data, async_op=True)
                assert work is not None
                works.append(work)
        return works


def _places(ranks: Sequence[int], groups: Iterable[Sequence[int]]) -> list[list[int]]:
    places = {rank: place for place, rank in enumerate(ranks)}
    return [[places[rank] for rank in members] for members in groups]
