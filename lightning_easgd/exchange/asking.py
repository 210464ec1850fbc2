"""A worker asks its server one thing at a time, and looks for the answer between its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import torch

from lightning_easgd.communication import ExchangeError
from lightning_easgd.exchange.timing import StepTimer
from lightning_easgd.server.courier import Courier
from lightning_easgd.telemetry import Telemetry

log = logging.getLogger(__name__)

_LOOKS = 0.05
"""Seconds between two looks whether the server is lost."""


@dataclass(frozen=True)
class Asked:
    """What the server was asked and did not answer yet."""

    answer: futures.Future[Any]
    take: Callable[[Any], None]
    """Takes the answer in."""


class Asking:
    """What a worker asks of its server.

    Args:
        courier: brings it there.
        telemetry: where waits are counted.
        timer: told of waits and answers.
        timeout: seconds that the worker waits for a server that is gone.
    """

    def __init__(
        self, courier: Courier, telemetry: Telemetry, timer: StepTimer, *, timeout: float
    ) -> None:
        self._courier = courier
        self._telemetry = telemetry
        self._timer = timer
        self._timeout = timeout
        self._asked: Asked | None = None

    @property
    def pending(self) -> bool:
        """Whether something was asked whose answer was not taken in."""
        return self._asked is not None

    def answered(self) -> bool:
        """Whether an answer has come and only waits to be taken in."""
        return self._asked is not None and self._asked.answer.done()

    def ask(self, what: Callable[[], Any], take: Callable[[Any], None]) -> None:
        """Ask something; nothing is pending.

        Args:
            what: has it asked, in the courier's thread.
            take: takes the answer in, in this one.
        """
        self._asked = Asked(self._courier.ask(what), take)

    def wait(self) -> bool:
        """Wait for an answer, if one is expected; False if the server is gone."""
        return self._asked is None or self._take(self._asked, patience=0.0)

    def wait_patiently(self) -> None:
        """Wait for an answer, if one is expected, also while the server is gone.

        Raises:
            ExchangeError: none came in time.
        """
        if self._asked is None:
            return
        if self._lost:
            log.warning("This worker waits for a server, for %g s at most.", self._timeout)
        if not self._take(self._asked, patience=self._timeout):
            raise ExchangeError(
                f"No server answered within {self._timeout:g} s ({self._courier.client.lost})."
                " Start it again with the folder of its snapshots, or resume from the last"
                " checkpoint; exchange_timeout says how long workers wait."
            )

    @property
    def _lost(self) -> bool:
        return self._courier.client.lost is not None

    @torch.no_grad()
    def _take(self, asked: Asked, *, patience: float) -> bool:
        """Take an answer in when it is there; False if it is not.

        Args:
            asked: what it answers.
            patience: seconds to wait while the server is gone. Looks are counted, so that those in
                which this process was stopped do not count.
        """
        began, looks = time.perf_counter(), 0
        try:
            while not asked.answer.done():
                if self._lost:
                    if looks * _LOOKS >= patience:
                        return False
                    looks += 1
                futures.wait([asked.answer], _LOOKS)
        finally:
            waited = time.perf_counter() - began
            self._telemetry.wait_seconds += waited
            self._timer.wait(waited)
        self._asked = None
        self._timer.arrive()
        asked.take(asked.answer.result())
        return True
