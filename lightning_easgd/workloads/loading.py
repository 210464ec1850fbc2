"""A loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_easgd.workloads.sets import Batch


class ResumableLoader(DataLoader[Batch]):
    """Hands out, after resuming, the batches of the epoch that were not handed out before.

    Lightning saves the state of a loader that has one with every checkpoint. The batches before are
    drawn once more and dropped, with the random numbers of that time: the order, augmentations and
    loader processes' seeds of the rest are those of an epoch that was never interrupted.
    """

    _handed_out = 0
    _skip_next = 0
    _random_at_start: torch.Tensor | None = None

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        skip, self._skip_next = self._skip_next, 0
        return self._batches(skip)

    def _batches(self, skip: int) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=(), enabled=skip > 0):
            if skip and self._random_at_start is not None:
                torch.set_rng_state(self._random_at_start)
            self._random_at_start = torch.get_rng_state()
            batches = super().__iter__()
            for _ in range(skip):
                next(batches)
        self._handed_out = skip
        for batch in batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, and the random state that it began with."""
        return {"handed_out": self._handed_out, "random_at_start": self._random_at_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next epoch that is begun the rest of the one that was saved."""
        # As many workers as before have epochs as long as before; others meet at the same step.
        self._skip_next = state["handed_out"] % len(self)
        self._random_at_start = state["random_at_start"]
