"""Sums over all workers that travel while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easgd.communication.group import WorkerGroup
from lightning_easgd.communication.header import Header
from lightning_easgd.flat import bucket_slices


class PendingSum:
    """A sum in flight.

    Owns the collectives until :meth:`wait` returns; until then the tensors must not be touched.

    Args:
        header_work: the collective that gathers the headers.
        headers: where the headers arrive, one tensor per worker.
        group: the workers.
        what: it is, for messages.
    """

    def __init__(
        self,
        header_work: dist.Work,
        headers: Sequence[Tensor],
        *,
        group: WorkerGroup,
        what: str,
    ) -> None:
        self._header_work = header_work
        self._headers = headers
        self.works: list[dist.Work] = []
        """The collectives that sum."""
        self._group = group
        self._what = what
        self._blocking = group.data is group.control

    def headers(self, *, patiently: bool = False) -> list[Header]:
        """Wait for the headers of all workers; in rank order.

        Args:
            patiently: as long as all workers are alive.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        self._group.wait(self._header_work, self._what, patiently=patiently)
        return [Header.unpack(header.tolist()) for header in self._headers]

    def wait(self) -> None:
        """Wait until every tensor holds its sum.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        for work in self.works:
            self._group.wait(work, self._what, poll=self._blocking)


class AllReduce:
    """Sums lists of flat tensors over all workers, in buckets, in the background.

    Args:
        group: the workers.
        bucket_bytes: the most that one all-reduce carries, in bytes.
    """

    def __init__(self, group: WorkerGroup, bucket_bytes: int) -> None:
        self.group = group
        self.bucket_bytes = bucket_bytes

    def start(self, payload: Sequence[Tensor], header: Header) -> PendingSum:
        """Begin to replace each flat tensor by its sum over all workers, in place.

        All workers must bring tensors of the same sizes in the same order; the header goes first.
        """
        mine = torch.tensor(header.pack(), dtype=torch.int64)
        headers = [torch.empty_like(mine) for _ in range(self.group.size)]
        gather = dist.all_gather(headers, mine, group=self.group.control, async_op=True)
        assert gather is not None
        what = f"The exchange that worker {self.group.rank} began at step {header.clock}"
        pending = PendingSum(gather, headers, group=self.group, what=what)
        self.join(pending, payload)
        return pending

    def join(self, pending: PendingSum, payload: Sequence[Tensor]) -> None:
        """Begin to sum ``payload`` as :meth:`start` does, in an exchange whose header has left."""
        for tensor in payload:
            for bucket in bucket_slices(tensor.numel(), tensor.itemsize, self.bucket_bytes):
                work = dist.all_reduce(tensor[bucket], group=self.group.data, async_op=True)
                assert work is not None
                pending.works.append(work)

    @property
    def header_bytes(self) -> int:
        """Bytes of headers that each worker sends, and receives, in an exchange."""
        return 8 * len(Header.__dataclass_fields__) * (self.group.size - 1)

    def ring_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that each worker sends, and receives, in ring all-reduces: 2 (p-1)/p of them."""
        payload = sum(tensor.nbytes for tensor in tensors)
        return 2 * (self.group.size - 1) * payload // self.group.size
