"""Workers that a fast network joins: what they sum at every step, and what they agree on.

[Note: subgroups] A subgroup is a group of workers that train in lockstep; nobody in it goes on
without the others. Its process groups carry nothing else, so that they never wait for a sum between
subgroups that is on its way meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easgd.center.flat import bucket_slices
from lightning_easgd.communication import plain_data
from lightning_easgd.communication.workers import WorkerGroup


class Subgroup:
    """The workers of one subgroup. All workers must make theirs, at the same time.

    Args:
        group: all workers.
        subgroups: the ranks of every subgroup, in ascending order; every worker is in one.
        bucket_bytes: the most that one all-reduce carries, in bytes.

    Raises:
        ExchangeError: a worker left or did not come in time.
    """

    def __init__(
        self, group: WorkerGroup, subgroups: Sequence[Sequence[int]], bucket_bytes: int
    ) -> None:
        self.subgroups = [list(ranks) for ranks in subgroups]
        """The ranks of every subgroup, this one included."""
        self.ranks = next(ranks for ranks in self.subgroups if group.rank in ranks)
        self.size = len(self.ranks)
        self.place = self.ranks.index(group.rank)
        """Of this worker in :attr:`ranks`."""
        self._group = group
        self._bucket_bytes = bucket_bytes
        self.control = group.split(subgroups, "gloo")
        """The members, for what they tell each other."""
        backend = dist.get_backend()
        self.data = group.split(subgroups, backend)
        """The members, for sums."""
        self._polls = backend == "gloo"

    def gather(self, mine: Sequence[int], what: str, *, patiently: bool = False) -> list[list[int]]:
        """Numbers of every member, as many each, in the order of :attr:`ranks`.

        Args:
            mine: within 64 bits.
            what: they are for, for messages.
            patiently: wait as long as another worker gets on.

        Raises:
            ExchangeError: a worker left or did not answer in time.
        """
        numbers = torch.tensor(mine, dtype=torch.int64, device="cpu")
        everybody = [torch.empty_like(numbers) for _ in self.ranks]
        work = dist.all_gather(everybody, numbers, group=self.control, async_op=True)
        self._wait(work, what, patiently=patiently)
        return [member.tolist() for member in everybody]

    def sum_(self, tensors: Iterable[Tensor], what: str) -> None:
        """Replace flat tensors by their sums over the members; raises as :meth:`gather` does."""
        works = [
            dist.all_reduce(tensor[bucket], group=self.data, async_op=True)
            for tensor in tensors
            for bucket in bucket_slices(tensor.numel(), tensor.itemsize, self._bucket_bytes)
        ]
        for work in works:
            self._wait(work, what, poll=self._polls)

    def broadcast(self, value: Any, source: int, what: str, *, elements: int) -> tuple[Any, int]:
        """What the member at place ``source`` has, and its size in bytes; raises as :meth:`gather`.

        Args:
            value: plain data, as of plain_data.pack; tensors in it arrive in host memory.
            source: the place.
            what: it is for, for messages.
            elements: of the parameters that it is the state of; much more is not taken.
        """
        sends = self.place == source
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        content = plain_data.pack(value) if sends else nothing
        (size,) = self.gather([content.numel()], what)[source]
        rank = self.ranks[source]
        plain_data.require_size(size, plain_data.most_bytes_of_state(elements), f"Worker {rank}")
        if not sends:
            content = content.new_empty(size)
        self._wait(dist.broadcast(content, rank, group=self.control, async_op=True), what)
        return value if sends else plain_data.read(content, f"Worker {rank}"), size

    def gather_bytes(self, count: int) -> int:
        """Bytes that this worker sends, and receives, in :meth:`gather` of ``count`` numbers."""
        return 8 * count * (self.size - 1)

    def broadcast_bytes(self, size: int) -> int:
        """The same when ``size`` bytes are passed on to all; the mean over the members."""
        return (self.size - 1) * size // self.size

    def ring_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that this worker sends, and receives, in :meth:`sum_`."""
        return 2 * (self.size - 1) * sum(tensor.nbytes for tensor in tensors) // self.size

    def _wait(self, work: dist.Work | None, what: str, **how: bool) -> None:
        assert work is not None
        self._group.wait(work, what, **how)
