"""Those that were started with a worker which has finished, and waits for them.

[Note: progress, not life] A worker gives signs of life from a thread of its own, also while its
training is stuck. So it is awaited for as long as its count of batches and steps rises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from lightning_easgd.communication import ExchangeError
from lightning_easgd.server.values import News

log = logging.getLogger(__name__)

_LEAST = 10.0
"""Seconds without progress that nobody is blamed for: signs of life come once a second."""
_MOST_BETWEEN = 5.0
"""Seconds between two times of hearing that count; if it is more, this worker was stopped, too."""
_WARN_AFTER = 0.2
"""Part of the timeout."""


class Teammates:
    """How those are that still train.

    Args:
        timeout: seconds without progress of any of them, after which they are not awaited.
        clock: gives seconds.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = max(timeout, _LEAST)
        self._clock = clock
        self._heard_at: float | None = None
        self._progress: dict[str, int] = {}
        self._stood: dict[str, float] = {}
        self._told: set[str] = set()

    def hear(self, news: News) -> None:
        """Hear of them once more.

        Raises:
            ExchangeError: all that still train have stood for too long.
        """
        now = self._clock()
        passed = 0.0 if self._heard_at is None else min(now - self._heard_at, _MOST_BETWEEN)
        if self._heard_at is None and news.training:
            log.info("This worker has finished. %d others still train.", news.training)
        self._heard_at = now
        self._stood = {
            name: self._stood[name] + passed if self._progress.get(name) == count else 0.0
            for name, count in news.progress.items()
        }
        self._progress = news.progress
        self._warn()
        if len(self._stood) == news.training > 0 and self._stand(1.0) == list(self._stood):
            raise ExchangeError(
                f"This worker has finished and waits for {_listed(self._stood)}. Signs of life come"
                f" from there, but no progress for {min(self._stood.values()):.0f} s. Look what"
                " holds it up: storage, a loader, a deadlock? Then resume from the last checkpoint."
                " exchange_timeout says how long workers wait."
            )

    def _warn(self) -> None:
        late = [name for name in self._stand(_WARN_AFTER) if name not in self._told]
        if late:
            self._told.update(late)
            log.warning(
                "This worker has finished and waits for %s. Signs of life come from there, but no"
                " progress for %.0f s. After %g s without progress it ends with an error.",
                *(_listed(late), min(self._stood[name] for name in late), self._timeout),
            )

    def _stand(self, part: float) -> list[str]:
        """Who has stood for this part of the timeout."""
        return [name for name, stood in self._stood.items() if stood >= part * self._timeout]


def _listed(names: Collection[str]) -> str:
    """By their ranks, of which the server knows as parts of names."""
    return " and ".join(f"worker {name.rpartition('/')[2]}" for name in names)
