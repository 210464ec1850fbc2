"""The three numbers of an entry against the baseline: time, score and bytes, paired by seed.

[Note: baseline] Where nothing counted what the baseline sent, it is what the entry's
own runs say that averaged gradients would have sent in as many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from comparing.result import Point, Result

from presenting.difference import Spread, paired, saved
from presenting.entries import Entry, final, reached, score_at
from presenting.score import Score


@dataclass(frozen=True)
class Against:
    """An entry and the baseline; all spreads are over seeds that both have."""

    entry: Entry
    baseline: Entry | None
    score: Score
    target: float | None

    @property
    def is_baseline(self) -> bool:
        """Whether it is compared with itself."""
        return self.entry is self.baseline

    @cached_property
    def seconds(self) -> Spread:
        """Of training until the target was reached."""
        return Spread([*self._seconds(self.entry).values()])

    @cached_property
    def bytes(self) -> Spread:
        """Sent by a worker until the target was reached."""
        return Spread([*self._bytes(self.entry).values()])

    @cached_property
    def all_bytes(self) -> Spread:
        """Sent by a worker in the whole run."""
        return Spread([*self._all_bytes(self.entry).values()])

    @cached_property
    def all_seconds(self) -> Spread:
        """Of training, the whole run."""
        return Spread([*self.entry.values(lambda run: run.seconds).values()])

    @cached_property
    def final(self) -> Spread:
        """The score of the delivered model."""
        return Spread([*self.entry.values(final).values()])

    @cached_property
    def time_saved(self) -> Spread:
        """In percent of the baseline's time to the target."""
        return self._saved(self._seconds)

    @cached_property
    def bytes_saved(self) -> Spread:
        """In percent of the baseline's bytes to the target."""
        return self._saved(self._bytes)

    @cached_property
    def all_time_saved(self) -> Spread:
        """In percent of the baseline's time for as many samples."""
        return self._saved(lambda entry: entry.values(lambda run: run.seconds))

    @cached_property
    def all_bytes_saved(self) -> Spread:
        """In percent of the baseline's bytes for as many samples: see [Note: baseline]."""
        known = self._saved(self._all_bytes)
        if known or self.baseline is None or self.is_baseline:
            return known
        return saved(self._all_bytes(self.entry), self.entry.values(lambda run: run.ddp_bytes))

    @cached_property
    def gain(self) -> Spread:
        """By how much the score is better at as many samples."""
        if self.baseline is None:
            return Spread([])
        pairs = paired(self.entry.values(final), self.baseline.values(final))
        return Spread([self.score.gain(*pair) for pair in pairs])

    @cached_property
    def gain_at_equal_time(self) -> Spread:
        """Likewise of the last tests until the shorter of both runs ended."""
        if self.baseline is None:
            return Spread([])
        common = [seed for seed in self.entry.finished if seed in self.baseline.finished]
        pairs = [
            self._at_equal_time(self.entry.finished[seed], self.baseline.finished[seed])
            for seed in common
        ]
        return Spread([self.score.gain(*pair) for pair in pairs if None not in pair])

    def _at_equal_time(self, run: Result, other: Result) -> tuple[float | None, float | None]:
        if run.seconds is None or other.seconds is None:
            return None, None
        end = min(run.seconds, other.seconds)
        return score_at(run, end), score_at(other, end)

    def _saved(self, of: Callable[[Entry], Mapping[int, float]]) -> Spread:
        if self.baseline is None or self.is_baseline:
            return Spread([])
        return saved(of(self.entry), of(self.baseline))

    def _seconds(self, entry: Entry) -> dict[int, float]:
        return self._reached(entry, lambda point: point.seconds)

    def _bytes(self, entry: Entry) -> dict[int, float]:
        return self._reached(entry, lambda point: point.sent_bytes)

    def _all_bytes(self, entry: Entry) -> dict[int, float]:
        return entry.values(lambda run: run.sent_bytes)

    def _reached(self, entry: Entry, of: Callable[[Point], float | None]) -> dict[int, float]:
        def at_target(run: Result) -> float | None:
            point = reached(run, self.target, self.score)
            return None if point is None else of(point)

        return entry.values(at_target)
