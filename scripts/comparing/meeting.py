"""Where the workers of a job meet, whatever they train with: a store on worker 0's host."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Meeting:
    """Barriers and small messages over a store of this job's own.

    Args:
        port: where worker 0 listens, on MASTER_ADDR.
        timeout: seconds that workers wait for each other.
    """

    def __init__(self, port: int, timeout: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            world_size=self.size,
            is_master=self.rank == 0,
            timeout=timedelta(seconds=timeout),
        )

    def meet(self, place: str) -> None:
        """Wait until all workers are here."""
        if self._store.add(f"{place}/arrived", 1) == self.size:
            self._store.set(f"{place}/all", "")
        self._store.wait([f"{place}/all"])

    def arrive(self, place: str) -> None:
        """Be counted at a place, without waiting."""
        self._store.add(f"{place}/arrived", 1)

    def arrived(self, place: str) -> bool:
        """Whether all workers have been counted there."""
        return self._store.add(f"{place}/arrived", 0) == self.size

    def tell(self, name: str, value: Any) -> None:
        """Leave a message for the others."""
        self._store.set(name, json.dumps(value))

    def read(self, name: str) -> Any:
        """A message that somebody left, or will leave."""
        return json.loads(self._store.get(name))

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """On worker 0 the values of all workers, in rank order; None on the others."""
        self.tell(f"{name}/{self.rank}", value)
        if self.rank:
            return None
        return [self.read(f"{name}/{rank}") for rank in range(self.size)]
