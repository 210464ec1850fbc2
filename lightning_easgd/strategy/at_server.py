"""A worker's place at a server, from the terms that it is told to its leaving."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from lightning_easgd.center.center import Center
from lightning_easgd.center.wire import Wire
from lightning_easgd.server.client import CenterClient
from lightning_easgd.server.courier import Courier
from lightning_easgd.strategy.center_at import CenterAt
from lightning_easgd.strategy.options import Options

_LEAVING = 5.0
"""Seconds that a server has to hear that a worker leaves."""


@dataclass(frozen=True)
class AtServer:
    """What a worker needs of its server in a fit."""

    at: CenterAt
    courier: Courier
    options: Options
    """With the algorithm and the period that the server has."""
    seconds: float
    """Seconds that this worker stands still for a server that is gone."""

    @classmethod
    def ask(cls, center: Center, options: Options, *, timeout: timedelta) -> AtServer:
        """Ask the server for its terms.

        Args:
            center: of this worker's module.
            options: of the strategy.
            timeout: seconds for which the server is looked for, now and later.

        Raises:
            Refused: the server has another model, or does not let this worker in.
            UnreachableError: no server answered.
            ValueError: an option contradicts the terms.
        """
        at = options.center
        assert at is not None
        seconds = timeout.total_seconds()
        client = CenterClient(at.transport(), _name(), Wire(center).layout, patience=seconds)
        try:
            terms = client.ask_terms()
            options = options.at_server(terms)
        except BaseException:
            client.close()
            raise
        return cls(at, Courier(client), options, seconds)

    def leave(self) -> None:
        """Tell the server, if it can be told, and let go of it."""
        with suppress(Exception):
            if self.courier.client.lost is None:
                self.courier.ask(self.courier.client.leave).result(_LEAVING)
        self.courier.close()


def _name() -> str:
    """Of this process, and of no other worker."""
    host = "".join(c for c in platform.node() if c.isascii() and c.isprintable() and c != " ")
    return f"{host[:32]}-{os.getpid()}-{time.time_ns() // 10**6 % 10**9}"
