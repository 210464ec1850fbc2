"""A worker's place at a server, from the terms that it is told to its leaving."""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

from lightning_easgd.center.center import Center
from lightning_easgd.center.wire import Wire
from lightning_easgd.checkpoint.worker_checkpoints import CheckpointError
from lightning_easgd.communication import share
from lightning_easgd.communication.foreign import escape
from lightning_easgd.schedules.checks import require
from lightning_easgd.server.courier import Courier
from lightning_easgd.server.sharded import ShardedClient
from lightning_easgd.strategy.beside import Beside, absolute
from lightning_easgd.strategy.center_at import CenterAt
from lightning_easgd.strategy.local_server import LocalServer
from lightning_easgd.strategy.options import Options

_BEAT, _BEAT_ALONE = 1.0, 10.0
"""Seconds between two signs of life, where others wait for it and where nobody does."""
_LEAVING = 5.0
"""Seconds that a server has to hear that a worker leaves."""


@dataclass(frozen=True)
class AtServer:
    """What a worker needs of its server in a fit."""

    at: CenterAt
    courier: Courier
    options: Options
    """With the server's terms."""
    seconds: float
    """Seconds that this worker waits for a server that is gone."""

    beside: Beside | None = None
    """Of those that were started together; None: it is one worker."""
    local: LocalServer | None = None
    """The server, if this worker started it."""

    @classmethod
    def ask(
        cls,
        center: Center,
        options: Options,
        *,
        rank: int,
        workers: int,
        timeout: timedelta,
        folders: Sequence[str],
        goes_on_from: str,
    ) -> AtServer:
        """Ask the server for its terms; worker 0 starts it first if it is local.

        Args:
            center: of this worker's module.
            options: of the strategy.
            rank: of this worker.
            workers: how many were started together.
            timeout: how long the server is looked for, now and later.
            folders: below which this worker saves checkpoints; those of worker 0 count.
            goes_on_from: from which checkpoint this worker goes on, in words.

        Raises:
            Refused: the server has another model, or does not let this worker in.
            UnreachableError: no server answered.
            ExchangeError: worker 0 did not say where the server is.
            ValueError: an option contradicts the terms, or worker 0 has the keys of another site.
            CheckpointError: worker 0 goes on from something else.
        """
        at, seconds = options.center, timeout.total_seconds()
        assert at is not None
        with ExitStack() as failing:
            local = None
            if at.is_local and rank == 0:
                local = LocalServer(**options.settings(workers, lease=at.lease))
                failing.callback(local.end)
            told = None
            if rank == 0:
                addresses = [local.address()] if local else at.listed
                saved = [[*map(absolute, folders)], goes_on_from]
                told = json.dumps([secrets.token_hex(6), addresses, at.site, *saved])
            if workers > 1:
                told = share(told, rank=rank, size=workers, timeout=timeout)
            assert told is not None
            team, addresses, site, folders, theirs = json.loads(told)
            allowed = (
                f"of workers that were started together those of one site, as worker 0's ({site})"
            )
            require("keys", at.site, allowed, at.site == site)
            _require_same_start(rank, goes_on_from, theirs)
            addresses = addresses if at.is_local else at.listed
            client = ShardedClient(
                lambda shard: at.transport(addresses, shard),
                f"{team}/{rank}",
                Wire(center).layout,
                patience=seconds,
            )
            failing.callback(client.close)
            options = options.at_server(client.ask_terms())
            courier = Courier(client, team=workers, every=_BEAT if workers > 1 else _BEAT_ALONE)
            failing.pop_all()
        beside = Beside(courier, rank, folders) if workers > 1 else None
        return cls(at, courier, options, seconds, beside, local)

    def leave(self) -> None:
        """Tell the server, if it can be told, and let go of it.

        A server that this worker started ends now if this worker never began to train: others would
        train without the one that validates and saves.
        """
        with suppress(Exception):
            if self.courier.client.lost is None:
                self.courier.ask(self.courier.client.leave).result(_LEAVING)
        self.courier.close()
        if self.local is not None:
            (self.local.leave if self.courier.began else self.local.end)()


def _require_same_start(rank: int, ours: str, theirs: str) -> None:
    """Check that this worker goes on from what worker 0 does.

    Raises:
        CheckpointError: it does not.
    """
    if ours != theirs:
        raise CheckpointError(
            f"Worker {rank} on {platform.node()} goes on from {escape(ours)}, and worker 0 from"
            f" {escape(theirs)}. Let all machines see the same folder, or copy the checkpoint, with"
            " its folder, to the same place on each."
        )
