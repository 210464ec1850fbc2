"""How long a worker lets a call take, from what earlier ones took.

[Note: apart] A sign of life takes a moment, and a model takes as long as the link needs, which may
be slow in one direction only. So each kind of call is measured by itself.
"""

from __future__ import annotations

import statistics
from collections import deque

_FIRST = 60.0
_LEAST = 5.0
_MEASURED = 32
_ENOUGH = 4
_GROWTH = 4


class Deadline:
    """Seconds that calls of one kind may take: 10 times what they took lately, and at least 5."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=_MEASURED)
        self._grown = 1

    @property
    def seconds(self) -> float:
        """For the next call."""
        if len(self._took) < _ENOUGH:
            return self._grown * max(_FIRST, 10 * max(self._took, default=0.0))
        usual = statistics.median(self._took)
        spread = statistics.median(abs(took - usual) for took in self._took)
        return self._grown * max(_LEAST, 10 * (usual + spread))

    def met(self, took: float) -> None:
        """Learn from a call that was answered after so many seconds."""
        if self._grown > 1:  # it took a longer deadline, so what was measured before is out of date
            self._took.clear()
            self._grown = 1
        self._took.append(took)

    def lost(self, took: float) -> None:
        """Learn from a call that was given up: more time for the next, if its time was over."""
        if took >= 0.9 * self.seconds:
            self._grown *= _GROWTH
