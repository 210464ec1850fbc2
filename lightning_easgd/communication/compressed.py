"""Sums through a codec: shorter on the wire, and nothing is lost.

[Note: two steps] Worker j owns the j-th part of every bucket. Everybody sends each owner its part,
encoded (all-to-all); the owner decodes and adds, encodes the sum, and sends it to all (all-gather).
Each worker moves 2 (p-1)/p of the encoded bucket, as in a ring all-reduce, however many there are,
and all decode the same bytes: the centers stay equal, bit for bit.

[Note: what encoding loses] What encoding loses is kept where it was lost, and goes with the next
exchange (error feedback; Seide et al. 2014, Karimireddy et al. 2019, arXiv:1901.09847). The worker
keeps what it did not send, and the owner what it did not add to the center. So the weights of the
workers, of the center and what is kept always add up. A worker that is pulled, and keeps much,
reckons with that; see algorithms/elastic.py, [Note: residual]. The last exchange is not encoded. It
takes along what owners and workers kept. Only workers that reckoned with it take it back instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easgd.center.flat import bucket_slices
from lightning_easgd.communication.all_reduce import AllReduce, Level, Payload, PendingSum
from lightning_easgd.communication.background import Background
from lightning_easgd.communication.codecs import Codec, waiting_time
from lightning_easgd.communication.workers import WorkerGroup

# Its name since torch 2.14, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_MUCH = 1.01
"""Exchanges that a value waits, above which what is held back is much."""

_AHEAD = 2
"""Collectives that begin before the first of them is waited for."""


def interleave(runs: Sequence[Iterator[None]]) -> None:
    """Take the steps of runs by turns, so that at most a few are under way, which keep memory."""
    stages = 3
    for tick in range(len(runs) + _AHEAD * (stages - 1)):
        for stage in range(stages):
            number = tick - _AHEAD * stage
            if 0 <= number < len(runs):
                next(runs[number], None)


class Owned:
    """A bucket of a tensor of differences, of which every worker owns an equal share.

    Args:
        part: where it lies in the tensor.
        block: shares are multiples of it, filled up with zeros.
        workers: how many there are.
        like: a tensor of the precision and on the device of the differences.
    """

    def __init__(self, part: slice, block: int, workers: int, like: Tensor) -> None:
        self.part = part
        self.numel = part.stop - part.start
        self.share = math.ceil(self.numel / (block * workers)) * block
        self.residual = like.new_zeros(self.share)
        """What this worker, as the owner, did not add to the sum."""

    def own(self, tensor: Tensor, rank: int) -> Tensor:
        """A view of the part of the bucket that worker ``rank`` owns."""
        first = min(rank * self.share, self.numel)
        return tensor[self.part][first : first + self.share]


class Account:
    """What this worker holds back of one tensor.

    Args:
        tensor: of differences.
        codec: how it is written.
        feedback: whether what is not sent is kept.
        workers: how many there are.
        bucket_bytes: the most that one collective carries, uncompressed.
    """

    def __init__(
        self, tensor: Tensor, codec: Codec, *, feedback: bool, workers: int, bucket_bytes: int
    ) -> None:
        self.residual = torch.zeros_like(tensor) if feedback else None
        self.buckets = []
        if codec.block is not None:
            self.buckets = [
                Owned(part, codec.block, workers, tensor)
                for part in bucket_slices(tensor.numel(), tensor.itemsize, bucket_bytes)
            ]

    def values(self, tensor: Tensor, workers: int) -> list[list[Tensor]]:
        """Views of a tensor as it is sent: a list for each bucket, or one of the tensor alone."""
        if not self.buckets:
            return [[tensor]]
        return [[bucket.own(tensor, rank) for rank in range(workers)] for bucket in self.buckets]

    def state(self) -> dict[str, Any]:
        """For a checkpoint of this worker."""
        return {"residual": self.residual, "owners": [bucket.residual for bucket in self.buckets]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, as far as shapes agree.

        With another number of workers a share lies elsewhere, so what its owner kept is dropped.
        """
        ours = [bucket.residual for bucket in self.buckets]
        pairs = list(zip(ours, state["owners"], strict=False))
        if self.residual is not None and state["residual"] is not None:
            pairs.append((self.residual, state["residual"]))
        for mine, saved in pairs:
            if mine.shape == saved.shape:
                mine.copy_(saved)


class CompressedAllReduce(AllReduce):
    """Sums differences in the form of a codec, and statistics as they are.

    Args:
        group: all workers.
        bucket_bytes: the most that one collective carries, uncompressed.
        codec: how differences are written.
        feedback: whether a worker keeps what encoding lost, also if the codec leaves it in the
            worker's weights: these do not last where workers restart, or lose what was not sent.
        level: the workers that sum; their ``data`` group carries nothing else.
        control: as of AllReduce.
    """

    has_residual = True

    def __init__(
        self,
        group: WorkerGroup,
        bucket_bytes: int,
        codec: Codec,
        *,
        feedback: bool = False,
        level: Level,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group, bucket_bytes, level=level, control=control)
        self._codec = codec
        self._feedback = codec.feedback or feedback
        self._pulls = not feedback
        self._waits: float | None = None
        self._accounts: dict[str, Account] = {}
        self._saved: dict[str, Mapping[str, Any]] = {}

    def waits(self, device: torch.device) -> tuple[float, float]:
        """Measured on ``device``; the owner's is 1 if all workers get what each sends."""
        if self._waits is None:
            self._waits = waiting_time(self._codec, device)
        return self._waits, 1.0 if self._codec.block is None else self._waits

    def add_residual_(self, differences: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times what is held back of differences to them, if workers reckon so."""
        if self.corrects_pull:
            accounts = self._accounts_of(differences)
            for tensor, account in zip(differences.values(), accounts, strict=True):
                assert account.residual is not None
                tensor.add_(account.residual, alpha=weight)

    @property
    def corrects_pull(self) -> bool:
        """Whether workers are pulled and hold much back, as :meth:`waits` has measured."""
        return self._pulls and self._codec.feedback and (self._waits or 1.0) > _MUCH

    def quantize_(self, differences: Iterable[Tensor]) -> None:
        """Replace differences by what is sent of them, where the rest is not held back."""
        if not self._feedback:
            for tensor in differences:
                tensor.copy_(self._decoded(self._codec.encode(tensor), tensor))

    def join(self, pending: PendingSum, payload: Payload, *, last: bool = False) -> None:
        """Begin to sum in an exchange whose header has left."""
        accounts = self._accounts_of(payload.differences)
        self._add_residuals(payload, accounts, last=last)
        if last:
            super().join(pending, payload)
            return
        device = next(iter(payload.differences.values())).device
        travel = partial(self._travel, payload, accounts)
        pending.parts.append((Background(travel, device), True))

    def keep_residual(self, payload: Payload, *, last: bool = False) -> None:
        """Hold back what :meth:`join` would, and send nothing."""
        accounts = self._accounts_of(payload.differences)
        self._add_residuals(payload, accounts, last=last)
        if not last:
            for tensor, account in zip(payload.differences.values(), accounts, strict=True):
                for number in range(max(1, len(account.buckets))):
                    self._encode(tensor, account, number)

    def _add_residuals(self, payload: Payload, accounts: Sequence[Account], *, last: bool) -> None:
        """Add to differences what was held back of them; the last time owners do so, too."""
        for tensor, account in zip(payload.differences.values(), accounts, strict=True):
            if account.residual is not None and not (last and self.corrects_pull):
                tensor.add_(account.residual)
            if last:
                self._flush(tensor, account)

    def sum_bytes(self, payload: Payload, *, last: bool = False) -> tuple[int, int]:
        """Bytes that each worker sends, and receives, for sums; none are inside a group."""
        if last:
            return super().sum_bytes(payload)
        others, moved = self.level.size - 1, self.ring_bytes(payload.statistics)
        tensors = payload.differences.values()
        for tensor, account in zip(tensors, self._accounts_of(payload.differences), strict=True):
            if self._codec.block is None:
                moved += others * self._codec.wire_bytes(tensor.numel())
            for bucket in account.buckets:
                moved += 2 * others * self._codec.wire_bytes(bucket.share)
        return moved, 0

    def state(self) -> dict[str, Any]:
        """What is held back, for a checkpoint of this worker."""
        accounts = {name: account.state() for name, account in self._accounts.items()}
        return {"accounts": {**self._saved, **accounts}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`; takes effect when the differences are known."""
        self._accounts, self._saved = {}, dict(state.get("accounts", {}))

    def _accounts_of(self, differences: Mapping[str, Tensor]) -> list[Account]:
        """Of the differences, in order; those that have none get one."""
        for name, tensor in differences.items():
            if name not in self._accounts:
                account = Account(
                    tensor,
                    self._codec,
                    feedback=self._feedback,
                    workers=self.level.size,
                    bucket_bytes=self.bucket_bytes,
                )
                if name in self._saved:
                    account.load_state(self._saved.pop(name))
                self._accounts[name] = account
        return [self._accounts[name] for name in differences]

    def _flush(self, tensor: Tensor, account: Account) -> None:
        """Hold nothing back; what was not sent is in the differences already."""
        if account.residual is not None:
            account.residual.zero_()
        for bucket in account.buckets:
            own = bucket.own(tensor, self.level.rank)
            own.add_(bucket.residual[: own.numel()])
            bucket.residual.zero_()

    def _encode(self, tensor: Tensor, account: Account, number: int) -> Tensor:
        """The bytes of a bucket, a row for each owner, or of the whole; the rest is kept."""
        values = account.values(tensor, self.level.size)[number]
        share = max(value.numel() for value in values)
        if account.buckets:
            share = account.buckets[number].share
        wire = tensor.new_empty(len(values), self._codec.wire_bytes(share), dtype=torch.uint8)
        residuals: list[Tensor | None] = [None] * len(values)
        if account.residual is not None:
            residuals = [*account.values(account.residual, self.level.size)[number]]
        for row, mine, residual in zip(wire, values, residuals, strict=True):
            missing = share - mine.numel()
            full = torch.nn.functional.pad(mine, (0, missing)) if missing else mine
            row.copy_(self._codec.encode(full))
            if residual is not None:
                torch.sub(mine, self._decoded(row, full)[: mine.numel()], out=residual)
        return wire

    def _travel(self, payload: Payload, accounts: Sequence[Account]) -> None:
        """Turn the payload into sums; the same collectives on all workers.

        Waits without looking whether others are late, which would take the interpreter's lock from
        training again and again. The thread that waits for this one looks.
        """
        works = self.sum(payload.statistics)
        pairs = list(zip(payload.differences.values(), accounts, strict=True))
        if self._codec.block is None:
            interleave([self._whole(*pair) for pair in pairs])
        else:
            interleave(
                [
                    self._bucket(tensor, account, number)
                    for tensor, account in pairs
                    for number in range(len(account.buckets))
                ]
            )
        for work in works:
            work.wait()

    def _whole(self, tensor: Tensor, account: Account) -> Iterator[None]:
        arrival = self._begin(_all_gather, self._encode(tensor, account, 0))
        yield
        tensor.zero_()
        self._add_rows(arrival(), tensor)

    def _bucket(self, tensor: Tensor, account: Account, number: int) -> Iterator[None]:
        bucket = account.buckets[number]
        arrival = self._begin(dist.all_to_all_single, self._encode(tensor, account, number))
        yield
        arrival = self._begin(_all_gather, self._add_up(bucket, arrival()))
        yield
        for rank, row in enumerate(arrival()):
            mine = bucket.own(tensor, rank)
            mine.copy_(self._decoded(row, bucket.residual)[: mine.numel()])

    def _add_up(self, bucket: Owned, rows: Tensor) -> Tensor:
        """The encoded sum of this worker's share, from the encoded parts of all; a row."""
        self._add_rows(rows, bucket.residual)
        wire = self._codec.encode(bucket.residual)
        bucket.residual.sub_(self._decoded(wire, bucket.residual))
        return wire[None]

    def _add_rows(self, rows: Tensor, total: Tensor) -> None:
        for row in rows:  # in rank order: all workers add in the same order
            total.add_(self._decoded(row, total))

    def _begin(self, collective: Any, rows: Tensor) -> Callable[[], Tensor]:
        """Start a collective that gives every worker a row of each; waits for them when called."""
        arrived = rows.new_empty(self.level.size, rows.shape[1])
        work = collective(arrived.view(-1), rows.view(-1), group=self.level.data, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return arrived

        return wait

    def _decoded(self, wire: Tensor, like: Tensor) -> Tensor:
        return self._codec.decode(wire, like.numel(), like.dtype)
