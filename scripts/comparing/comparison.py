"""From a configuration to results: the whole comparison."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import configs
from omegaconf import DictConfig, OmegaConf

from comparing import paired, report
from comparing.job import Workbench
from comparing.plan import Entry, Plan
from comparing.result import Job, Result
from comparing.running import Jobs

_WORKLOAD = ("data", "module", "workers", "epochs")


class Comparison:
    """Contenders over periods, learning rates and seeds, as configured.

    Args:
        cfg: conf/compare.yaml, composed.
        output: the folder of results; those that are there are not looked for again.

    Raises:
        ValueError: something that was asked for is impossible; says what.
    """

    def __init__(self, cfg: DictConfig, output: Path) -> None:
        _check(cfg)
        self._cfg = cfg
        self._path = output / "results.jsonl"
        self._plan = Plan(
            entries=list(_entries(cfg)),
            rates=list(cfg.rates or [None]),
            seeds=range(cfg.seed, cfg.seed + cfg.seeds),
            tuning=cfg.tuning_seeds,
        )
        self._parallel = cfg.parallel or max(1, (os.cpu_count() or 1) // cfg.workers)
        self._found: dict[Job, Result] = {}
        self._failed: dict[str, Result] = {}
        self._began = time.monotonic()

    def run(self) -> bool:
        """Train what is left, and report all; whether nothing failed."""
        self._go_on()
        try:
            if self._cfg.train and self._next() is not None:
                self._train()
        finally:
            self._report()
        return not self._failed

    def _train(self) -> None:
        before = self._done()
        work = Workbench(self._cfg).work
        with Jobs(work, self._cfg.workers, self._cfg.job_timeout) as running:
            while True:
                while len(running) < self._parallel and (job := self._next(running)):
                    running.start(job, self._settings_of(job))
                if not len(running):
                    return
                result = running.wait()
                self._keep(result)
                print(f"{self._progress(before)} {report.told(result)}", flush=True)

    def _next(self, running: Jobs | tuple[()] = ()) -> Job | None:
        """The most urgent job that is neither found nor running, of a contender that works."""
        for job in self._plan.jobs(self._found):
            done = job in self._found or job in running
            if not done and job.contender not in self._failed:
                return job
        return None

    def _keep(self, result: Result) -> None:
        if result.error is None:
            self._found[result.job] = result
        else:
            self._failed[result.contender] = result
        with self._path.open("a") as file:
            print(json.dumps(result.to_json()), file=file)

    def _settings_of(self, job: Job) -> dict[str, Any]:
        """The contender's configuration with the job's period and rate, and the workload."""
        cfg = OmegaConf.merge(self._cfg, {"tau": job.tau or 1, "seed": job.seed})
        resolved = configs.resolved(cfg)
        contender = resolved["compared"][job.contender]
        optimizer = resolved["optimizer"] or contender["optimizer"]
        if job.rate is not None:
            optimizer = optimizer | {"lr": job.rate}
        workload = {key: resolved[key] for key in _WORKLOAD}
        return {"optimizer": optimizer, "strategy": contender["strategy"], "workload": workload}

    def _go_on(self) -> None:
        """Take over what earlier runs found with the settings of now; what failed is run again."""
        if not self._path.exists():
            return
        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        results = [Result.from_json(line) for line in lines if line.get("error") is None]
        self._found = {result.job: result for result in results if self._is_of_now(result)}

    def _is_of_now(self, result: Result) -> bool:
        named = result.contender in self._cfg.compared
        return named and self._settings_of(result.job) == result.settings

    def _done(self) -> int:
        return sum(job in self._found for job in self._plan.jobs(self._found))

    def _progress(self, before: int) -> str:
        """How far it is, and for how long it goes on like this.

        Args:
            before: how many jobs were done when it began.
        """
        done, total = self._done(), len(self._plan)
        each = (time.monotonic() - self._began) / max(1, done - before)
        return f"[{done}/{total}, about {(total - done) * each / 60:.0f} min left]"

    def _report(self) -> None:
        titles = {name: config.title for name, config in self._cfg.compared.items()}
        print(f"\n{paired.table(self._plan, self._found, titles, self._cfg.baseline)}\n")
        if len(self._cfg.taus) > 1:
            self._report_periods(titles)
        for name, result in self._failed.items():
            reason = (result.error or "").splitlines()[-1]
            print(f"error: {name} was left out: {result.job} failed, {reason}", file=sys.stderr)
        print(f"results.jsonl is in {self._path.parent}")

    def _report_periods(self, titles: Mapping[str, str]) -> None:
        results = [r for entry in self._plan.entries for r in self._plan.best(entry, self._found)]
        print(f"{report.table(results, titles)}\n")
        picture = self._path.with_name("accuracy.png")
        try:
            report.draw(results, titles, picture)
        except ModuleNotFoundError:
            print('no picture: pip install -e ".[scripts]" brings matplotlib', file=sys.stderr)


def _entries(cfg: DictConfig) -> Iterator[Entry]:
    for name, config in cfg.compared.items():
        has_period = "${tau}" in OmegaConf.to_yaml(config)
        yield from ((name, tau) for tau in (cfg.taus if has_period else [None]))


def _check(cfg: DictConfig) -> None:
    numbers = {name: cfg[name] for name in ("seeds", "workers", "epochs", "tuning_seeds")}
    numbers |= {f"taus[{i}]": tau for i, tau in enumerate(cfg.taus)}
    numbers |= {} if cfg.parallel is None else {"parallel": cfg.parallel}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} got {value!r}; allowed is a whole number from 1 on.")
    for rate in cfg.rates or []:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"rates got {rate!r}; allowed are numbers above 0.")
    if not cfg.taus or not cfg.compared:
        raise ValueError("taus and compared got nothing; name one of each or more.")
