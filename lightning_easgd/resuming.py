"""The first epoch after resuming draws the same batches as if training had not stopped.

[Note: iterators] An epoch begins by making the loader's iterator, which draws random numbers (the
order of a shuffling loader, the seeds of its processes) and may read the sampler at once. When
Lightning resumes it makes the iterator before the sampler is told the epoch, and does not make
another. So the iterator of an epoch that begins with the resumed run is made once more, at the
moment at which training makes it otherwise: with the random state restored and the epoch known.
Loaders that keep their own state, and epochs that were stopped in the middle, stay as they are.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_easgd.internals import LoopHooks, starts_resumed_epoch, train_loaders


def begin_epoch_as_usual(trainer: pl.Trainer, hooks: LoopHooks) -> None:
    """Make the iterator of the first resumed epoch when the epoch begins."""

    def renew(data_fetcher: Any) -> None:
        stateful = any(hasattr(loader, "load_state_dict") for loader in train_loaders(trainer))
        if starts_resumed_epoch(trainer) and not stateful:
            iter(data_fetcher)

    hooks.before_first_batch(renew)
