"""What one worker measures of one job."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl

from comparing.counting import sent_bytes

STALL_EVERY = 16
"""Steps between two stalls of a worker, on average."""


@dataclass(frozen=True)
class Measurement:
    """What one worker measured between two steps."""

    steps: int
    """Steps between the two."""
    seconds: float
    """Time between the two."""
    step_seconds: list[float]
    """Time of each step."""
    waits: list[float] | None
    """Seconds it waited for each exchange; None if that cannot be told from computing."""
    sent_bytes: float
    """Bytes on the interface, per worker of this machine."""
    peak_bytes: int
    """The most memory that the whole job had, besides what its process began with."""
    parameters: int
    """Elements of the trained parameters."""
    period: int | None
    """Steps between two exchanges in the end; None without exchanges."""
    samples: int
    """Of the steps between the two."""
    coupled: bool
    """Whether exchanges keep the workers together."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """The steps that are measured: from the end of batch ``first`` - 1 on."""

    first: int
    steps: int

    @property
    def total(self) -> int:
        """Steps of the whole fit."""
        return self.first + self.steps


class Stalls(pl.Callback):
    """Makes this worker stall at random, at the same steps under every contender.

    Args:
        seconds: of a stall; 0 for none.
        seed: of this worker's random numbers.
    """

    def __init__(self, seconds: float, seed: str) -> None:
        self._seconds = seconds
        self._random = random.Random(seed)

    def on_train_batch_start(self, *_: Any) -> None:
        """Before each batch."""
        if self._seconds and self._random.random() < 1 / STALL_EVERY:
            time.sleep(self._seconds)


class Pace(pl.Callback):
    """Makes steps longer, without a processor.

    Args:
        seconds: by which all are longer.
        times: how many times as long they take then.
        waited: seconds that this worker has waited for exchanges so far, if anybody knows:
            those do not take longer on a slower machine.
    """

    def __init__(self, seconds: float, times: float, waited: Callable[[], float | None]) -> None:
        self._seconds, self._times, self._waited = seconds, times, waited

    def on_train_batch_start(self, *_: Any) -> None:
        """Before each batch."""
        self._began = time.perf_counter() - (self._waited() or 0.0)
        time.sleep(self._seconds)

    def on_train_batch_end(self, *_: Any) -> None:
        """After each batch."""
        took = time.perf_counter() - (self._waited() or 0.0) - self._began
        time.sleep(max(0.0, (self._times - 1) * took))


class Meter(pl.Callback):
    """Reads the counters after each batch of a window. Must be the last callback.

    Args:
        window: what is measured.
        interface: whose bytes are counted.
        waited: seconds that this worker has waited so far; None if nobody knows.
    """

    def __init__(self, window: Window, interface: str, waited: Callable[[], float | None]) -> None:
        self._window = window
        self._interface = interface
        self._waited = waited
        self._ends: list[float] = []
        self._waits: list[float | None] = []
        self._sent: list[int] = []
        self._batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        """After each batch."""
        self._batches += 1
        if not self._window.first <= self._batches <= self._window.total:
            return
        if self._batches in (self._window.first, self._window.total):
            self._sent.append(sent_bytes(self._interface))
        self._ends.append(time.perf_counter())
        self._waits.append(self._waited())

    @property
    def seconds(self) -> float:
        """Of the window."""
        return self._ends[-1] - self._ends[0]

    @property
    def step_seconds(self) -> list[float]:
        """Of each step in the window."""
        return [b - a for a, b in pairwise(self._ends)]

    @property
    def sent_bytes(self) -> int:
        """In the window."""
        return self._sent[-1] - self._sent[0]

    @property
    def waits(self) -> list[float] | None:
        """Of each exchange that was awaited in the window."""
        known = [each for each in self._waits if each is not None]
        if len(known) < len(self._waits):
            return None
        return [b - a for a, b in pairwise(known) if b > a]
