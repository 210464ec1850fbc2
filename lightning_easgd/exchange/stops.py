"""Why training stops: what one worker is asked, what all agree on, and when it takes effect."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_easgd.communication import Stop


class Stops:
    """Lets all workers stop at the same step; see link.py, [Note: who decides]."""

    def __init__(self) -> None:
        self.requested = Stop.NO
        """Why this worker was asked to stop; its next header says so."""
        self.stopping = Stop.NO
        """Why training ends with this step, on every worker."""
        self.askers: list[int] = []
        """Ranks of the workers that were asked to."""
        self._agreed = Stop.NO

    def request(self, why: Stop) -> None:
        """This worker is asked to stop. Signal-safe."""
        self.requested = max(self.requested, why)

    def hear(self, stops: Sequence[Stop], ranks: Sequence[int]) -> None:
        """Draw the conclusion that all others draw too, from what each worker was asked."""
        if (why := max(stops)) > self._agreed:
            self._agreed = why
            told = zip(ranks, stops, strict=True)
            self.askers = [rank for rank, stop in told if stop is why]

    def take_effect(self) -> None:
        """What was agreed on counts from here on.

        At an exchange, not when a header is read, which is not the same step on all workers.
        """
        self.stopping = self._agreed

    def forget(self) -> None:
        """Another training begins; an exception that is on its way still ends it."""
        if not self._agreed.by_exception:
            self._agreed = self.stopping = Stop.NO
        if not self.requested.by_exception:
            self.requested = Stop.NO
