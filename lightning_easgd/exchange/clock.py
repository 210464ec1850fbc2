"""When: the optimizer steps that were taken, and the one at which the next exchange is due."""

from __future__ import annotations

from lightning_easgd.schedules import Period
from lightning_easgd.telemetry import Telemetry


class Clock:
    """Counts optimizer steps, equally on all workers at every exchange.

    Args:
        period: τ.
        telemetry: where τ is recorded.
    """

    def __init__(self, period: Period, telemetry: Telemetry) -> None:
        self.period = period
        self._telemetry = telemetry
        self.begun = False
        """Whether training has; before that, the module is the center, whatever it holds."""
        self.steps = self.next_due = 0
        self.samples = 0
        """That this worker has trained on in this fit."""

    def set(self, steps: int) -> None:
        """An exchange began after so many steps, or training does."""
        self.steps = steps
        self._telemetry.tau, self.next_due = self.period.after(steps)

    def resume(self, steps: int, *, tau: int, next_due: int) -> None:
        """Go on after so many steps with the period that was in force."""
        self.steps = steps
        often = self.period.often  # perhaps another one now
        self._telemetry.tau, self.next_due = tau, -(-next_due // often) * often
