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
next epoch as begun. A checkpoint that is made in it would, when resumed from, add an epoch.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def begin_epoch_as_usual(trainer: pl.Trainer) -> None:
    """Make the iterator of the first resumed epoch when the epoch begins; on this trainer only."""
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    lightnings_own = epoch_loop.on_run_start

    def on_run_start(data_fetcher: Any) -> None:
        del epoch_loop.on_run_start
        resumed = fit_loop.is_resuming or epoch_loop.restarting
        begins = epoch_loop.batch_progress.current.ready == 0
        states = fit_loop._combined_loader_states_to_load
        if states:
            assert fit_loop._combined_loader is not None
            fit_loop._combined_loader._load_state_dicts(states)
            fit_loop._combined_loader_states_to_load = []
        if states or (resumed and begins and not _keeps_state(fit_loop._combined_loader)):
            iter(data_fetcher)
        progress = fit_loop.epoch_progress
        if progress.total.ready == trainer.current_epoch:
            progress.increment_ready()
            progress.increment_started()
        lightnings_own(data_fetcher)

    epoch_loop.on_run_start = on_run_start  # type: ignore[method-assign]


def _keeps_state(combined_loader: Any) -> bool:
    return any(hasattr(loader, "load_state_dict") for loader in combined_loader.flattened)
