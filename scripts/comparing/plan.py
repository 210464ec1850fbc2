"""Which jobs a comparison has, in which order, and which learning rate is a contender's best."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from comparing.result import Job, Result

Entry = tuple[str, int | None]
"""A contender and its period."""

Found = Mapping[Job, Result]


@dataclass(frozen=True)
class Plan:
    """Contenders over periods, learning rates and seeds."""

    entries: Sequence[Entry]
    rates: Sequence[float | None]
    """Those that every entry tries; None is a contender's own."""
    seeds: Sequence[int]
    tuning: int
    """With so many of the seeds, the first, all rates are tried; with the others the best one."""

    def __len__(self) -> int:
        """How many jobs there are."""
        more = (len(self.rates) - 1) * len(self.seeds[: self.tuning])
        return len(self.entries) * (len(self.seeds) + more)

    def jobs(self, found: Found) -> Iterator[Job]:
        """Those that can run by what is found, the most urgent first; what has run is among them.

        Seeds are outermost, so that what was stopped early has all contenders.
        """
        for number, seed in enumerate(self.seeds):
            for entry in self.entries:
                rates = self.rates if number < self.tuning else self._best(entry, found)
                yield from (Job(*entry, rate, seed) for rate in rates)

    def best(self, entry: Entry, found: Found) -> list[Result]:
        """What was found with the best of the rates that were tried."""
        rates = self._best(entry, found, partly=True)
        jobs = [Job(*entry, rate, seed) for rate in rates for seed in self.seeds]
        return [found[job] for job in jobs if job in found]

    def tried(self, entry: Entry, found: Found) -> dict[float | None, float]:
        """Mean test accuracy of the tuning, by rate; one that diverged got nothing right."""
        jobs = {
            rate: [Job(*entry, rate, seed) for seed in self.seeds[: self.tuning]]
            for rate in self.rates
        }
        return {
            rate: statistics.fmean(found[job].score or 0.0 for job in each)
            for rate, each in jobs.items()
            if all(job in found for job in each)
        }

    def _best(self, entry: Entry, found: Found, *, partly: bool = False) -> list[float | None]:
        """The best rate; none before all were tried, or any if partly."""
        if len(self.rates) == 1:
            return list(self.rates)
        tried = self.tried(entry, found)
        enough = tried if partly else len(tried) == len(self.rates)
        return [max(tried, key=tried.__getitem__)] if enough else []
