"""A worker that waits for no other, in the place of a group of workers."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_easgd.communication.progress import Progress
from lightning_easgd.communication.workers import WorkerGroup


class SoloGroup(WorkerGroup):
    """One worker without a process group: what it would ask of others, it knows by itself."""

    def __init__(self) -> None:
        self.backend, self.polls = "gloo", True
        self.rank, self.size = 0, 1
        self.progress = Progress()

    @override
    def gather(self, value: Any) -> list[Any]:
        return [value]

    @override
    def explain(self, error: BaseException) -> None:
        """Nobody is missing."""

    @override
    def abandon(self, reason: str, *, alone: bool = True) -> None:
        """Nobody is told."""

    @override
    def close(self) -> None:
        """There is nothing to leave."""
