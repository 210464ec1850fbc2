"""What is found and what failed, in this run and in those that it goes on with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from comparing.clusters import TorchrunCluster
from comparing.result import Job, Result
from comparing.store import Store


class Ledger:
    """The results that count, which only worker 0 of a cluster stores.

    Args:
        folder: of the results.
        contenders: those that take part.
        settings_of: all that a job's result depends on; what was found with others does not count.
        cluster: which this process is one of; None: it is alone.
        speaks: whether this process stores and prints.
    """

    def __init__(
        self,
        folder: Path,
        contenders: Iterable[str],
        settings_of: Callable[[Job], Mapping[str, Any]],
        cluster: TorchrunCluster | None = None,
        *,
        speaks: bool = True,
    ) -> None:
        self.store = Store(folder)
        self.found: dict[Job, Result] = {}
        self.failed: dict[str, Result] = {}
        """By contender."""
        self._names = set(contenders)
        self._settings_of = settings_of
        self._cluster = cluster
        self._speaks = speaks

    def go_on(self) -> None:
        """Take over what earlier runs found with the settings of now; what failed runs again."""
        earlier = [result.to_json() for result in self.of_now()] if self._speaks else []
        if self._cluster is not None:
            earlier = self._cluster.share(earlier)
        results = map(Result.from_json, earlier)
        self.found = {result.job: result for result in results if result.error is None}

    def of_now(self) -> list[Result]:
        """All that is stored of the settings of now, what failed too."""
        return [result for result in self.store.read() if self._is_of_now(result)]

    def _is_of_now(self, result: Result) -> bool:
        named = result.contender in self._names
        return named and self._settings_of(result.job) == result.settings

    def keep(self, result: Result) -> None:
        """Add one."""
        if result.error is None:
            self.found[result.job] = result
        else:
            self.failed[result.contender] = result
        if self._speaks:
            self.store.add(result)

    def is_open(self, job: Job) -> bool:
        """Whether a job is to be run, of a contender that works."""
        return job not in self.found and job.contender not in self.failed

    def tell(self, line: str) -> None:
        """Print a line, at once."""
        if self._speaks:
            print(line, flush=True)

    def tell_start(self, job: Job) -> None:
        """Show on a terminal which job starts, until the next line takes its place."""
        if self._speaks and sys.stdout.isatty():
            print(f"{job} ...", end="\r", flush=True)

    def tell_failures(self) -> None:
        """Print what failed, and why."""
        for name, result in self.failed.items():
            reason = (result.error or "").splitlines()[-1].strip()
            print(f"error: {name} was left out: {result.job} failed, {reason}", file=sys.stderr)
