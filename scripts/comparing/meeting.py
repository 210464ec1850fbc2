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
        self._exchanges = 0
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

    def raise_flag(self, name: str) -> None:
        """Let all workers see something."""
        self._store.set(f"flag/{name}", "")

    def sees_flag(self, name: str) -> bool:
        """Whether somebody has let all see it."""
        return bool(self._store.check([f"flag/{name}"]))

    def await_flag(self, name: str) -> None:
        """Wait until somebody has let all see it."""
        self._store.wait([f"flag/{name}"])

    def exchange(self, value: Any) -> list[Any]:
        """What all workers give here, in rank order."""
        self._exchanges += 1
        names = [f"exchange{self._exchanges}/{rank}" for rank in range(self.size)]
        self._store.set(names[self.rank], json.dumps(value))
        return [json.loads(self._store.get(name)) for name in names]

    def leave(self) -> None:
        """Be done; worker 0, which has the store, waits for the others."""
        names = [f"left/{rank}" for rank in range(self.size)]
        self._store.set(names[self.rank], "")
        if self.rank == 0:
            self._store.wait(names)
