"""How far the workers are from the center and from each other, as their headers tell it.

[Note: variance] Nobody holds all workers. But with their distances from the center in the headers,
and the mean m of the weights in the sum that has arrived,

    (1/p) Σ_i ‖x^i - m‖² = (1/p) Σ_i ‖x^i - c‖² - ‖m - c‖².

The sum arrives after its headers, and its norm may differ in the last bit between processors: so
it travels, in the header of the next exchange, and that of the first worker who knows it counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_easgd.communication import Header
from lightning_easgd.schedules import Durations, Observation

_UNKNOWN = -1.0


class Consensus:
    """Adds up what the exchanges of a round tell, in which every fragment has its turn.

    Args:
        turns: fragments of the model.
    """

    def __init__(self, turns: int) -> None:
        self.variance = _UNKNOWN
        """Across workers, of the latest whole round; negative where it is not known."""
        self._turns = turns
        self._next = 0
        self._sums = [0.0, 0.0, 0.0]

    def note(self, turn: int, headers: Sequence[Header], mean: float | None) -> Observation:
        """What an exchange tells; equal on all workers.

        Args:
            turn: which fragment it was of.
            headers: of all workers, at least one of them with finite weights.
            mean: ‖m - c‖ of the fragment; None where it is not known.
        """
        durations = [_durations(header) for header in headers]
        if turn == 0:
            self._next, self._sums = 0, [0.0, 0.0, 0.0]
        whole = turn == self._next == self._turns - 1
        self._next = self._next + 1 if turn == self._next else -1
        squares = [h.distance * h.distance for h in headers if not h.non_finite]
        square = sum(squares) / len(squares)
        spread = math.inf if mean is None else max(0.0, square - mean * mean)
        parts = (square, headers[0].size * headers[0].size, spread)
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)]
        if not whole:
            return Observation(durations)
        distance, size, variance = self._sums
        self.variance = variance if math.isfinite(variance) else _UNKNOWN
        spoken = [(h.variance, h.lr) for h in headers if h.variance >= 0]
        known, lr = spoken[0] if spoken else (None, 0.0)
        relative = math.sqrt(distance) / max(math.sqrt(size), 1e-30)
        return Observation(durations, relative if math.isfinite(relative) else None, known, lr)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"variance": self.variance, "next": self._next, "sums": self._sums}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`state`; None: there was none."""
        if state is None:
            return
        self.variance, self._next, self._sums = state["variance"], state["next"], state["sums"]


def _durations(header: Header) -> Durations:
    return Durations(
        header.step_microseconds, header.exchange_microseconds, header.cost_microseconds
    )
