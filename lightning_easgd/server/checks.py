"""What a server asks of a difference before it takes it in."""

from __future__ import annotations

import math

from lightning_easgd.schedules.checks import is_number
from lightning_easgd.server.refusal import Refusal, Refused


def require_later(sequence: int, last: int) -> None:
    """Check that a difference is not an earlier one; raises Refused."""
    if sequence <= last:
        raise Refused(
            Refusal.SUPERSEDED,
            f"Difference {sequence} came after difference {last} of the same worker, and was not"
            " added. Send one when the one before has its receipt.",
        )


def require_samples(samples: float) -> None:
    """Check a number of samples; raises Refused."""
    if not (is_number(samples) and samples > 0):
        raise Refused(
            Refusal.MALFORMED, f"samples={samples!r} is not allowed. Allowed: a positive number."
        )


def require_finite(norm: float, what: str) -> None:
    """Check that a vector is finite, by its norm; raises Refused."""
    if not math.isfinite(norm):
        raise Refused(
            Refusal.NOT_FINITE,
            f"{what} of this worker has values that are not finite, or too large a norm, and was"
            " left out. Let the worker start again at the center, with a smaller learning rate.",
        )
