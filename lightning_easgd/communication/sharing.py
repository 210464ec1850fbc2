"""What worker 0 tells those that were started with it, once, without a process group."""

from __future__ import annotations

import itertools
from datetime import timedelta

from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from lightning_easgd.communication.header import ExchangeError

_numbers = itertools.count()
_stores: list[Store] = []
"""Kept: others may read from that of worker 0 later."""


def share(text: str | None, *, rank: int, size: int, timeout: timedelta) -> str:
    """The text of worker 0, which does not wait until the others have read it.

    All workers call it equally often, with MASTER_ADDR and MASTER_PORT set.

    Args:
        text: of worker 0.
        rank: of this worker.
        size: how many there are.
        timeout: how long worker 0 is awaited.

    Raises:
        ExchangeError: it did not come.
    """
    key = f"easgd/shared/{next(_numbers)}"
    try:
        if not _stores:
            _stores.append(next(rendezvous("env://", rank, size, timeout=timeout))[0])
        if text is not None:
            _stores[0].set(key, text)
            return text
        _stores[0].wait([key], timeout)
        shared: str = _stores[0].get(key).decode()
        return shared
    except (RuntimeError, OSError, ValueError) as error:
        raise ExchangeError(
            f"Worker {rank} waited for worker 0 to say where the center is ({error}). Look for the"
            " error of worker 0 first."
        ) from error
