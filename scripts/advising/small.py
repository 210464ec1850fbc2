"""What it would cost to exchange small parameters more often: see docs/how/often.md.

[Note: busy] Whether exchanges of small parameters hide is expected, not measured: by how long the
network is busy with all sums of a period, in proportion to their bytes, which leaves out how long
a message takes to begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from advising.judging import Advice

_BELOW = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Small:
    """The parameters below a size, exchanged every ``Measured.often_tau`` steps besides."""

    below: int
    """Elements."""
    parameters: int
    elements: int
    bytes_per_hour: int
    """Of all exchanges of a worker, in its steps as they are expected."""
    busy: float
    """The share of the time in which sums are on their way: see [Note: busy]."""

    @property
    def hides(self) -> bool:
        """Whether all sums have the time to arrive."""
        return self.busy <= 1


def small(advice: Advice) -> list[Small]:
    """What is below some sizes, where that is not nothing, not all and not as below a smaller."""
    found: dict[int, Small] = {}
    sizes = advice.measured.sizes
    for below in _BELOW:
        few = [size for size in sizes if size < below]
        if 0 < len(few) < len(sizes):
            found.setdefault(len(few), _small(advice, below, few))
    return list(found.values())


def _small(advice: Advice, below: int, few: Sequence[int]) -> Small:
    best, full, measured = advice.best, advice.options[0], advice.measured
    sent = {each.compression: each.trials[0].sent_bytes for each in measured.exchanges}
    pause = measured.often_tau * measured.fragments
    # In a step, on average: of a full exchange in full precision, and of one in the best form.
    often = sum(few) / sum(measured.sizes) / measured.often_tau
    seldom = (1 - sum(few) / sum(measured.sizes)) / (pause * math.ceil(best.tau / pause))
    moved = often * sent[full.compression] + seldom * sent[best.compression]
    seconds = often * full.exchange_seconds + seldom * best.exchange_seconds
    return Small(
        below=below,
        parameters=len(few),
        elements=sum(few),
        bytes_per_hour=round(3600 * moved / max(measured.step_seconds, seconds)),
        busy=seconds / measured.step_seconds,
    )
