"""What the engine asks of a link, whatever is on its other side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from lightning_easgd.communication import AllReduce
from lightning_easgd.exchange.difference import Pull
from lightning_easgd.exchange.states import Owed
from lightning_easgd.exchange.timing import StepTimer


class Link(Protocol):
    """Brings a worker's difference to a center, and the center here up to date.

    At most one exchange is under way.
    """

    timer: StepTimer
    all_reduce: AllReduce
    """Whose residual a checkpoint has."""
    owed: Owed | None
    """Whether the worker has to go on from the center at a later step."""

    def start_training(self) -> None:
        """Begin as if there had been no exchange yet."""

    def begin(self, *, goes_on: bool) -> bool:
        """Training begins.

        Args:
            goes_on: whether the worker has weights of its own already, from a checkpoint.

        Returns:
            Whether the center here is that of the module at the first batch.
        """

    def refresh(self) -> None:
        """Let the center here be the newest that there is; nothing is under way."""

    def forget_owed(self) -> None:
        """Let the worker go on from where it is."""

    @property
    def resets_workers(self) -> bool:
        """Whether workers that are pulled restart at the center that is under way."""

    def arrived(self) -> bool:
        """Whether what is under way has arrived and only waits to be taken in."""

    def go_on(self, clock: float = math.inf) -> None:
        """Let the worker go on from the center, if it has to by ``clock`` and did not yet."""

    def start(self, clock: int, *, last: bool = False) -> Pull:
        """Send this worker's difference off.

        Args:
            clock: steps taken.
            last: whether the worker does not go on after it.

        Returns:
            The pull, by which the caller moves the worker.
        """

    def wait(self) -> None:
        """Wait for what is under way, if anything, and bring the center up to date."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it. Nothing may be under way."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
