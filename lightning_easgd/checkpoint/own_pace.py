"""What workers save that wait for nobody.

The files are those of worker_checkpoints.py. Worker 0 writes its own and the main file when it
saves, and each other worker its own when it hears of that. So the main file knows no digests of
these: each file has its own. A worker that was not in time, or not there, has no file.

[Note: removed meanwhile] A checkpoint may go while a worker writes its file. So the worker looks
for worker 0's file when it is done; and whoever removes a checkpoint looks for more files when
worker 0's is gone. One of the two sees the file of a worker that is late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_easgd.center.digest import fingerprint
from lightning_easgd.checkpoint.files import (
    is_there,
    remove_if_empty,
    worker_file,
    workers_folder,
)
from lightning_easgd.checkpoint.ordered_writes import OrderedWrites, Write
from lightning_easgd.checkpoint.own_values import OwnValues
from lightning_easgd.checkpoint.state import PACE
from lightning_easgd.checkpoint.worker_checkpoints import worker_state
from lightning_easgd.exchange.exchange import Exchange


def save_own(
    writes: OrderedWrites,
    checkpoint: Mapping[str, Any],
    made: Sequence[tuple[str, str]],
    *,
    rank: int,
    exchange: Exchange,
    own: OwnValues,
) -> None:
    """Write a worker's own state beside checkpoints that worker 0 made.

    Args:
        writes: how files are written.
        checkpoint: Lightning's, as this worker dumped it.
        made: path of the main file and id of each save.
        rank: of this worker; not 0.
        exchange: of this worker.
        own: values of this worker's module.

    Raises:
        OSError: it could not be written, and the checkpoint is still there.
    """
    exchange.drain()
    weights = own.read(own.moved())
    state = worker_state(checkpoint, save="", rank=rank, exchange=exchange, weights=weights)
    shared = exchange.shared_state()
    pace = {name: shared[name] for name in PACE}
    for path, save in made:
        content = replace(state, save=save, pace=pace).plain()
        content["digest"] = list(fingerprint(content))
        file = worker_file(path, save, rank)
        try:
            writes.save(content, file, None, Write())
        except OSError:
            if is_there(worker_file(path, save, 0)):
                raise
        writes.when_written(file, partial(_remove_late, writes, path, save, rank))


def _remove_late(writes: OrderedWrites, path: str, save: str, rank: int) -> None:
    """Remove the file of a checkpoint that is gone; see [Note: removed meanwhile]."""
    if not is_there(worker_file(path, save, 0)):
        with suppress(OSError):
            writes.storage.remove_checkpoint(worker_file(path, save, rank))
        remove_if_empty(workers_folder(path))
