"""From a configuration to results: what contenders learn, in which time, with how many bytes."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import configs
import emulation
from omegaconf import DictConfig, OmegaConf
from plugging import read_by

from comparing.clusters import TorchrunCluster, rank_on_cluster
from comparing.contender import choose, contenders_of
from comparing.ledger import Ledger
from comparing.networks import Setting, rate_of
from comparing.plan import Entry, Plan
from comparing.progress import Progress
from comparing.result import Job, Result
from comparing.running import ClusterJobs, Jobs, Launcher, emulated
from comparing.table import Table
from comparing.work import Workbench
from lightning_easgd.schedules.checks import require_count

_WORKLOAD = ("workers", "points", "metric", "train_loss", "accelerator", "classes")
_READ = ("contender", "module", "data", *_WORKLOAD)
_ABOUT = (
    *("network", "workers", "metric", "lower_is_better", "target", "baseline", "taus"),
    *("epochs", "points"),
)


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
        resolved = OmegaConf.to_container(cfg.contender, resolve=True)
        choose(contenders_of(resolved), cfg.accelerator, by_name=True, learns=True)
        self._rank = rank_on_cluster()
        network = cfg.network if self._rank is None else "cluster"
        self._titles = {name: config.title for name, config in cfg.contender.items()}
        self._plan = Plan(
            entries=list(_entries(cfg)),
            rates={name: list(_rates(cfg, name)) for name in cfg.contender},
            seeds=range(cfg.seed, cfg.seed + cfg.seeds),
            tuning=cfg.tuning_seeds,
            network=network,
            hosts=cfg.workers if self._rank is None else int(os.environ["WORLD_SIZE"]),
            apart=cfg.network is not None or cfg.tuning_epochs not in (None, cfg.epochs),
            lower=cfg.lower_is_better,
        )
        self._output = output

    def run(self) -> bool:
        """Train what is left, and report all; whether nothing failed."""
        cluster = None if self._rank is None else self._join()
        self._ledger = Ledger(
            self._output,
            self._cfg.contender,
            self._settings_of,
            cluster,
            speaks=not self._rank,
        )
        self._ledger.go_on()
        if not self._cfg.train:
            self._require_results()
        try:
            if self._cfg.train and self._plan.left(self._found):
                self._train(cluster)
        finally:
            if not self._rank:
                self._report()
        if cluster is not None:
            cluster.leave()
        return not self._ledger.failed

    @cached_property
    def _work(self) -> Callable[..., Any]:
        return Workbench(self._cfg.get("data")).work

    def _join(self) -> TorchrunCluster:
        return TorchrunCluster(self._work, self._cfg.port, self._cfg.job_timeout)

    def _train(self, cluster: TorchrunCluster | None) -> None:
        if not self._rank:
            self._ledger.store.describe(self._about())
        earlier = [self._found[j] for j in self._plan.jobs(self._found) if j in self._found]
        self._progress = Progress(
            ((each.job, each.job_seconds) for each in earlier),
            work=self._epochs,
            at_once=lambda job: self._room if job.network is None else 1,
        )
        # Rates are tried first, without the network, then all that counts runs on it.
        for network in dict.fromkeys((None, self._plan.network)):
            if self._next(network) is not None:
                with self._launcher(network, cluster) as running:
                    self._run(running, network)

    def _run(self, running: Launcher, network: str | None) -> None:
        while True:
            while len(running) < running.room and (job := self._next(network, running)):
                self._ledger.tell_start(job)
                running.start(job, self._settings_of(job))
            if not len(running):
                return
            result = running.wait()
            self._ledger.keep(result)
            left = [*filter(self._ledger.is_open, self._plan.left(self._found))]
            told = self._progress.end(result.job, result.job_seconds, left)
            self._ledger.tell(f"{told} {self._told(result)}")

    def _launcher(self, network: str | None, cluster: TorchrunCluster | None) -> Launcher:
        cfg = self._cfg
        if cluster is not None:
            return ClusterJobs(lambda: cluster)
        if network is None:
            return Jobs(self._work, workers=cfg.workers, room=self._room, timeout=cfg.job_timeout)
        setting = Setting(network, cfg.workers)
        return emulated(cfg, setting, self._work, self._output, threads=1)

    def _next(self, network: str | None, running: Launcher | tuple[()] = ()) -> Job | None:
        """The most urgent job that is neither found nor running, of a contender that works."""
        for job in self._plan.jobs(self._found):
            if job.network == network and job not in running and self._ledger.is_open(job):
                return job
        return None

    def _settings_of(self, job: Job) -> dict[str, Any]:
        """All that the job's result depends on, resolved but for the environment."""
        cfg = OmegaConf.merge(self._cfg, {"tau": job.tau or 1, "seed": job.seed})
        optimizer = _optimizer(cfg, job.contender)
        if optimizer is not None:
            rate = {} if job.rate is None else {"lr": job.rate}
            cfg.optimizer = OmegaConf.merge(optimizer, rate)
        resolved = configs.resolved(read_by(cfg, _READ))
        return {
            "contender": resolved["contender"][job.contender],
            "module": resolved["module"],
            "data": resolved.get("data"),
            "workload": {key: resolved[key] for key in _WORKLOAD} | {"epochs": self._epochs(job)},
        }

    def _epochs(self, job: Job) -> int:
        return (job.tuning and self._cfg.tuning_epochs) or self._cfg.epochs

    @property
    def _room(self) -> int:
        """Jobs that run at the same time, without a network."""
        return self._cfg.parallel or max(1, (os.cpu_count() or 1) // self._cfg.workers)

    def _about(self) -> dict[str, Any]:
        cfg = configs.resolved(read_by(self._cfg, [*_READ, *_ABOUT]))
        return {key: cfg[key] for key in _ABOUT} | {
            "network": self._plan.network,
            "workers": self._plan.hosts,
            "titles": self._titles,
            "seeds": list(self._plan.seeds),
            "rates": self._plan.rates,
            "tuning_seeds": list(self._plan.seeds[: self._plan.tuning]),
            "tuning_apart": self._plan.apart,
            "model": self._cfg.module.get("_target_"),
            "data": (self._cfg.get("data") or {}).get("_target_"),
            "configuration": cfg,
        }

    def _require_results(self) -> None:
        """Say so where there is nothing to show, and how what is there came about.

        Raises:
            ValueError: the folder has no result of the settings of now.
        """
        if self.results():
            return
        told, store = f"{self._output} has no result of these settings.", self._ledger.store
        if others := len(store.read()):
            command = store.about().get("command", "not recorded")
            told += f" It has {others} of others. Repeat their command, but train=false:\n{command}"
        raise ValueError(told)

    def results(self) -> list[Result]:
        """All that is stored of what is asked for now, what failed too; once it ran."""
        return [result for result in self._ledger.of_now() if self._plan.has(result.job)]

    @property
    def _found(self) -> dict[Job, Result]:
        return self._ledger.found

    def _told(self, result: Result) -> str:
        """One result in words."""
        if result.error is not None:
            return f"{result.job} failed on {result.error}"
        if result.score is None:
            return f"{result.job}: diverged, {result.diverged}"
        loss = "" if result.loss is None else f", training loss {result.loss:.3f}"
        return f"{result.job}: {self._table.shown(result.score)}{loss}, {result.seconds:.1f} s"

    @property
    def _table(self) -> Table:
        cfg = self._cfg
        return Table(self._plan, self._titles, cfg.metric, cfg.baseline, cfg.target)

    def _report(self) -> None:
        print(f"\n{self._table.text(self._found)}\n")
        self._ledger.tell_failures()
        if results := self.results():
            self._write_page(results)
        print(f"results.jsonl is in {self._output}")

    def _write_page(self, results: Sequence[Result]) -> None:
        try:
            from presenting.page import write_page
        except ModuleNotFoundError as error:
            missing = f'{error.name} is missing: pip install -e ".[scripts]"'
            print(f"no report.html, for {missing}", file=sys.stderr)
            return
        print(write_page(results, self._ledger.store.about(), self._output))


def _entries(cfg: DictConfig) -> Iterator[Entry]:
    for name, config in cfg.contender.items():
        has_period = "${tau}" in OmegaConf.to_yaml(config)
        yield from ((name, tau) for tau in (cfg.taus if has_period else [None]))


def _optimizer(cfg: DictConfig, name: str) -> DictConfig | None:
    """What a contender trains with, if the module takes an optimizer."""
    reads = "${optimizer" in OmegaConf.to_yaml(cfg.module)
    found = cfg.optimizer or cfg.contender[name].get("optimizer")
    if reads and found is None:
        raise ValueError(
            f"contender {name} has no optimizer of its own. Give it one in its file, or set"
            " optimizer=NAME, a file of conf/optimizer."
        )
    return found if reads else None


def _rates(cfg: DictConfig, name: str) -> Iterator[float | None]:
    """Learning rates that a contender tries: as many for each."""
    optimizer = _optimizer(cfg, name)
    own = None if optimizer is None else optimizer.get("lr")
    if rates := cfg.rates.get(name) if isinstance(cfg.rates, DictConfig) else cfg.rates:
        yield from rates
    elif own is None:
        yield None
    else:
        yield from (float(f"{factor * own:.6g}") for factor in cfg.factors)


def _numbers(rates: Any) -> list[Any]:
    """All of a list, or of the lists of contenders; none of null."""
    lists = rates.values() if isinstance(rates, DictConfig) else [rates or []]
    return [rate for each in lists for rate in each]


def _check(cfg: DictConfig) -> None:
    units = {"seeds": "seeds", "workers": "workers", "epochs": "epochs", "tuning_seeds": "seeds"}
    more = {"parallel": "jobs", "tuning_epochs": "epochs"}
    units |= {name: unit for name, unit in more.items() if cfg[name] is not None}
    for name, unit in units.items():
        cfg[name] = require_count(name, cfg[name], unit)
    cfg.taus = [require_count(f"taus[{i}]", tau, "steps") for i, tau in enumerate(cfg.taus)]
    if isinstance(cfg.rates, DictConfig) and (unknown := set(cfg.rates) - set(cfg.contender)):
        raise ValueError(
            f"rates got {', '.join(sorted(unknown))}; allowed are {', '.join(cfg.contender)}."
        )
    for name in ("rates", "factors"):
        for rate in _numbers(cfg[name]):
            known = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if not known or not 0 < rate < math.inf:
                raise ValueError(f"{name} got {rate!r}; allowed are numbers above 0.")
    if cfg.network is not None:
        if rank_on_cluster() is not None:
            raise ValueError("On a cluster the network is what it is. Leave out network.")
        rate_of(cfg.network)
        if cfg.train and (reason := emulation.unavailable()) is not None:
            raise ValueError(f"Hosts cannot be emulated: {reason}. Or set network=null.")
    if not cfg.taus or not cfg.contender or not (cfg.rates or cfg.factors):
        raise ValueError("taus, contender and factors got nothing; name one of each or more.")
