"""Which jobs a comparison has, in which order, and which learning rate is a contender's best."""

from __future__ import annotations

import math
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
    rates: Mapping[str, Sequence[float | None]]
    """Those that a contender tries; None is the module's own."""
    seeds: Sequence[int]
    tuning: int
    """With so many of the seeds, the first, all rates are tried; with the others the best one."""
    network: str | None = None
    """Of the runs that count."""
    hosts: int = 0
    """Workers of each job."""
    apart: bool = False
    """Whether runs that choose a rate are none of those that count."""
    lower: bool = False
    """Whether lower scores are better."""

    def __len__(self) -> int:
        """How many jobs there are."""
        return len(self.left({}))

    def jobs(self, found: Found) -> Iterator[Job]:
        """Those that can run by what is found, the most urgent first; what has run is among them.

        Seeds are outermost, so that what was stopped early has all contenders, and contenders are
        interleaved.
        """
        if self.apart:
            yield from (job for seed in self._first for job in self._tuning(seed))
        for number, seed in enumerate(self.seeds):
            tunes = not self.apart and number < self.tuning
            for entry in self.entries:
                rates = self.rates[entry[0]] if tunes else self._best(entry, found)
                yield from (self._job(entry, rate, seed) for rate in rates)

    def left(self, found: Found) -> list[Job]:
        """Those that are not found; of a contender whose best rate is not known yet, with any."""
        jobs = dict.fromkeys(self.jobs(found))
        for entry in self.entries:
            rates = self._best(entry, found) or self.rates[entry[0]][:1]
            jobs |= dict.fromkeys(self._job(entry, rates[0], seed) for seed in self.seeds)
        return [job for job in jobs if job not in found]

    def has(self, job: Job) -> bool:
        """Whether it may be one of the jobs, whatever is found."""
        entry = (job.contender, job.tau)
        if entry not in self.entries or job.rate not in self.rates[job.contender]:
            return False
        again = self._trial if job.tuning else self._job
        seeds = self._first if job.tuning else self.seeds
        return job.seed in seeds and job == again(entry, job.rate, job.seed)

    def best(self, entry: Entry, found: Found) -> list[Result]:
        """What was found with the best of the rates that were tried."""
        rates = self._best(entry, found, partly=True)
        jobs = [self._job(entry, rate, seed) for rate in rates for seed in self.seeds]
        return [found[job] for job in jobs if job in found]

    def tried(self, entry: Entry, found: Found) -> dict[float | None, float]:
        """Mean score of the tuning, by rate; one that diverged is the worst of all."""
        worst = math.inf if self.lower else 0.0
        jobs = {
            rate: [self._trial(entry, rate, seed) for seed in self._first]
            for rate in self.rates[entry[0]]
        }
        return {
            rate: statistics.fmean(_or(found[job].score, worst) for job in each)
            for rate, each in jobs.items()
            if all(job in found for job in each)
        }

    @property
    def _first(self) -> Sequence[int]:
        return self.seeds[: self.tuning]

    def _is_tuned(self, name: str) -> bool:
        return len(self.rates[name]) > 1

    def _tuning(self, seed: int) -> Iterator[Job]:
        for entry in self.entries:
            rates = self.rates[entry[0]] if self._is_tuned(entry[0]) else ()
            yield from (self._trial(entry, rate, seed) for rate in rates)

    def _trial(self, entry: Entry, rate: float | None, seed: int) -> Job:
        # The network does not matter for what is learned from as many samples where exchanges are
        # synchronous, and hardly where they are not; without it, several jobs run at a time.
        network = None if self.apart and self.network != "cluster" else self.network
        return Job(*entry, rate, seed, network, self.apart, self.hosts)

    def _job(self, entry: Entry, rate: float | None, seed: int) -> Job:
        return Job(*entry, rate, seed, self.network, hosts=self.hosts)

    def _best(self, entry: Entry, found: Found, *, partly: bool = False) -> list[float | None]:
        """The best rate; none before all were tried, or any if partly."""
        rates = self.rates[entry[0]]
        if len(rates) == 1:
            return list(rates)
        tried = self.tried(entry, found)
        enough = tried if partly else len(tried) == len(rates)
        choose = min if self.lower else max
        return [choose(tried, key=tried.__getitem__)] if enough else []


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
