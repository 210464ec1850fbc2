"""Sums among the workers of one island, whose headers stay among them as well."""

from __future__ import annotations

import torch.distributed as dist
from typing_extensions import override

from lightning_easgd.communication.all_reduce import AllReduce, Level, Payload
from lightning_easgd.communication.group import WorkerGroup
from lightning_easgd.communication.island import Island


class InsideAllReduce(AllReduce):
    """Sums lists of flat tensors over the members of an island.

    Each member is a party by itself, and goes by its place in the island.

    Args:
        group: all workers.
        bucket_bytes: the most that one all-reduce carries, in bytes.
        island: of this worker; nothing else may go through it.
    """

    def __init__(self, group: WorkerGroup, bucket_bytes: int, island: Island) -> None:
        level = Level(island.place, island.size, island.data)
        super().__init__(group, bucket_bytes, level=level)
        self.ranks = island.ranks
        self._island = island

    @property
    @override
    def control(self) -> dist.ProcessGroup | None:
        return self._island.control

    @property
    @override
    def parties(self) -> list[list[int]]:
        return [[place] for place in range(len(self.ranks))]

    @property
    @override
    def party(self) -> int:
        return self.ranks.index(self.group.rank)

    @property
    @override
    def header_bytes(self) -> tuple[int, int]:
        total, _ = super().header_bytes
        return total, total

    @override
    def sum_bytes(self, payload: Payload, *, last: bool = False) -> tuple[int, int]:
        total, _ = super().sum_bytes(payload, last=last)
        return total, total
