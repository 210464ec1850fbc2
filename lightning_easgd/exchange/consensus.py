"""How far the workers are from the center and from each other, as their headers tell it.

[Note: variance] Nobody holds all workers. But with their distances from the center in the headers,
and the mean m of the weights in the sum that has arrived,

    (1/p) Σ_i ‖x^i - m‖² = (1/p) Σ_i ‖x^i - c‖² - ‖m - c‖².

The sum arrives after its headers, and its norm may differ in the last bit between processors. So
the variance travels in the header of the next exchange, and all workers take that of the first one
who knows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from lightning_easgd.communication import Header
from lightning_easgd.schedules import Durations, Observation, Said, Schedules

_UNKNOWN = -1.0
_DURATIONS = ("step_microseconds", "exchange_microseconds", "cost_microseconds")


def fields_observed(schedules: Schedules) -> dict[str, type]:
    """Names and kinds of what workers measure for schedules; none where no schedule observes.

    Durations are in whole microseconds. ``distance`` is ‖x - c‖ of the fragments exchanged, before
    the pull, and ``size`` is ‖c‖ of the same. ``variance`` is that of the latest round that has
    arrived, negative where it is not known, and ``lr`` is the largest learning rate.
    """
    if not schedules.adaptive:
        return {}
    durations = dict.fromkeys(_DURATIONS, int)
    distances = dict.fromkeys(("distance", "size"), float)
    spread = dict.fromkeys(("variance", "lr") if schedules.read_variance else (), float)
    return {**durations, **distances, **spread}


class Consensus:
    """Adds up what the exchanges of a round tell; in a round every fragment is exchanged once.

    Args:
        fragment_count: fragments of the model.
    """

    def __init__(self, fragment_count: int) -> None:
        self.variance = _UNKNOWN
        """Across workers, of the latest whole round; negative where it is not known."""
        self._fragment_count = fragment_count
        self._next = 0
        self._sums = [0.0, 0.0, 0.0]

    def announce(
        self, measured: Durations, distance: float, size: float, *, lr: float | None
    ) -> dict[str, Any]:
        """What this worker says, as :func:`fields_observed`; None: variance is not read."""
        durations = zip(_DURATIONS, astuple(measured), strict=True)
        spread = {} if lr is None else {"variance": self.variance, "lr": float(lr)}
        return {**dict(durations), "distance": float(distance), "size": float(size), **spread}

    def note(self, index: int, headers: Sequence[Header], mean: float | None) -> Observation:
        """What an exchange tells; equal on all workers.

        Args:
            index: which fragment it was of.
            headers: of all workers, at least one of them with finite weights.
            mean: ‖m - c‖ of the fragment; None where it is not known.
        """
        durations = [_durations(header) for header in headers]
        if index == 0:
            self._next, self._sums = 0, [0.0, 0.0, 0.0]
        whole = index == self._next == self._fragment_count - 1
        self._next = self._next + 1 if index == self._next else -1
        said = [header.named for header in headers if not header.non_finite]
        square = sum(each["distance"] * each["distance"] for each in said) / len(said)
        spread = math.inf if mean is None else max(0.0, square - mean * mean)
        size = headers[0].named["size"]
        parts = (square, size * size, spread)
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)]
        if not whole:
            return Observation(durations, said=said)
        distance, size, variance = self._sums
        self.variance = variance if math.isfinite(variance) else _UNKNOWN
        known, lr = _first_known(header.named for header in headers)
        relative = math.sqrt(distance) / max(math.sqrt(size), 1e-30)
        finite = relative if math.isfinite(relative) else None
        return Observation(durations, finite, known, lr, said)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"variance": self.variance, "next": self._next, "sums": self._sums}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.variance, self._next, self._sums = state["variance"], state["next"], state["sums"]


def _durations(header: Header) -> Durations:
    return Durations(*(int(header.named[name]) for name in _DURATIONS))


def _first_known(said: Iterable[Said]) -> tuple[float | None, float]:
    """The variance, and the learning rate, of the first worker who knows it."""
    known = ((each["variance"], each["lr"]) for each in said if each.get("variance", _UNKNOWN) >= 0)
    return next(known, (None, 0.0))
