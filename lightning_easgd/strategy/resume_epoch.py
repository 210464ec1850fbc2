"""The first epoch after resuming draws the same batches as if training had not stopped.

[Note: iterators] An epoch begins by making the loader's iterator, which draws random numbers (the
order of a shuffling loader, the seeds of its processes) and may read the sampler at once. When
Lightning resumes it makes the iterator before the sampler is told the epoch, and does not make
another. So the iterator of an epoch that begins with the resumed run is made once more, at the
moment at which training makes it otherwise: with the random state restored and the epoch known.
Loaders that keep their own state, and epochs that were stopped in the middle, stay as they are.

[Note: loaders made early] A module that asks for ``trainer.estimated_stepping_batches``, as
schedules do, makes Lightning make the loader before the checkpoint is read, and never give it its
state. So that state is given to it when the epoch begins.

[Note: epochs not counted] After a checkpoint of an epoch's last batch Lightning does not count the
next epoch as begun. A checkpoint that is made in it would, when resumed from, add an epoch. And
one that a worker made while it was idle after its last batch, waiting to validate with the others,
would add a batch.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_easgd.strategy.lightning_internals import (
    LoopHooks,
    count_epoch,
    end_saved_epoch,
    load_loader_states,
    starts_resumed_epoch,
    train_loaders,
)


def begin_epoch_as_usual(trainer: pl.Trainer, hooks: LoopHooks) -> None:
    """Make the first resumed epoch what it would have been."""

    def renew(data_fetcher: Any) -> None:
        stateful = any(hasattr(loader, "load_state_dict") for loader in train_loaders(trainer))
        if load_loader_states(trainer) or (starts_resumed_epoch(trainer) and not stateful):
            iter(data_fetcher)
        count_epoch(trainer)
        end_saved_epoch(trainer, data_fetcher)

    hooks.before_first_batch(renew)
