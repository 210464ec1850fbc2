"""From a configuration to results: the whole benchmark."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import configs
import emulation
from omegaconf import DictConfig, OmegaConf
from plugging import read_by

from comparing import speed_report as report
from comparing.clusters import TorchrunCluster, rank_on_cluster
from comparing.contender import Contender, choose, contenders_of
from comparing.ledger import Ledger
from comparing.networks import Setting, rate_of
from comparing.progress import Progress
from comparing.result import Job, Result
from comparing.running import ClusterJobs, emulated
from comparing.speed_plan import jobs_of, settings_of
from comparing.summary import LIMIT, summarize
from comparing.work import Workbench
from lightning_easgd.schedules.checks import require_count

_WORKLOAD = ("steps", "accelerator", "threads", "pace")

_START_SECONDS_PER_HOST = 0.1
"""What it takes to make a host and its agent, about."""


class Benchmark:
    """Contenders on networks, as configured.

    Args:
        cfg: conf/benchmark.yaml, composed.
        output: the folder of results; those that are there are not measured again.
        by_name: whether the user named the contenders, so that one that cannot run is an error.

    Raises:
        ValueError: something that was asked for is impossible; says what and why.
    """

    def __init__(self, cfg: DictConfig, output: Path, *, by_name: bool) -> None:
        self._cfg = cfg
        self._output = output
        self._over = cfg.sweep.over
        configs = OmegaConf.to_container(cfg.get("contender") or DictConfig({}), resolve=True)
        self._titles = {name: each["title"] for name, each in configs.items()}
        found = choose(contenders_of(configs), cfg.accelerator, by_name=by_name)
        self._contenders: Mapping[str, Contender] = found[0]
        self._missing: Mapping[str, str] = found[1]
        self._baselines = _baselines(cfg.baselines, self._contenders)
        _check_numbers(cfg)
        self._rank = rank_on_cluster()
        periods = dict.fromkeys(self._contenders, cfg.tau)
        self._jobs = jobs_of(self._settings(), periods, cfg.repetitions, cfg.seed)

    def run(self) -> bool:
        """Measure what is left, and report all; whether nothing failed."""
        cluster, cfg, speaks = None, self._cfg, not self._rank
        if self._rank is not None:
            cluster = TorchrunCluster(self._work, cfg.port, cfg.job_timeout)
        self._settings_of = partial(settings_for, cfg)
        names = self._contenders
        ledger = Ledger(self._output, names, self._settings_of, cluster, speaks=speaks)
        ledger.go_on()
        for name, reason in self._missing.items() if speaks else ():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        left = [job for job in self._jobs if job not in ledger.found]
        earlier = [ledger.found[job] for job in self._jobs if job in ledger.found]
        progress = Progress((each.job, each.job_seconds) for each in earlier)
        for setting, jobs in groupby(left, key=lambda job: job.setting):
            if not self._run_setting(setting, list(jobs), ledger, progress, cluster):
                ledger.tell("Time is up. The same command with the same hydra.run.dir goes on.")
                break
        if speaks:
            self._report([ledger.found[job] for job in self._jobs if job in ledger.found])
            ledger.tell_failures()
        if cluster is not None:
            cluster.leave()
        return not ledger.failed

    @cached_property
    def _work(self) -> Callable[..., Any]:
        return Workbench(self._cfg.data).work

    def _settings(self) -> list[Setting]:
        cfg = self._cfg
        if self._rank is not None:
            _refuse_on_cluster(cfg)
            here = Setting("cluster", int(os.environ["WORLD_SIZE"]), cfg.stall, cfg.slow)
            return settings_of(here, self._over, cfg.sweep["values"])
        asked = Setting(cfg.network, cfg.hosts, cfg.stall, cfg.slow)
        settings = settings_of(asked, self._over, cfg.sweep["values"])
        for setting in settings:
            rate_of(setting.network)
        _refuse_to_emulate(cfg)
        return settings

    def _run_setting(
        self,
        setting: Setting,
        jobs: Sequence[Job],
        ledger: Ledger,
        progress: Progress,
        cluster: TorchrunCluster | None,
    ) -> bool:
        """Run jobs of one setting; False when time is up."""
        start = _START_SECONDS_PER_HOST * setting.hosts
        if self._is_too_late(jobs[0], progress, start):
            return False
        with self._launcher(setting, cluster) as launcher:
            for job in filter(ledger.is_open, jobs):
                if self._is_too_late(job, progress):
                    return False
                ledger.tell_start(job)
                launcher.start(job, self._settings_of(job))
                result = launcher.wait()
                ledger.keep(result)
                left = [*filter(ledger.is_open, self._jobs)]
                ledger.tell(f"{progress.end(job, result.job_seconds, left)} {_told(result)}")
        return True

    def _launcher(self, setting: Setting, cluster: TorchrunCluster | None) -> ClusterJobs:
        if cluster is not None:
            return ClusterJobs(lambda: cluster)
        return emulated(self._cfg, setting, self._work, self._output, threads=self._cfg.threads)

    def _is_too_late(self, job: Job, progress: Progress, start: float = 0.0) -> bool:
        minutes = self._cfg.minutes
        end = progress.elapsed + start + progress.expected(job)
        return minutes is not None and end > 60 * minutes

    def _report(self, results: Sequence[Result]) -> None:
        summaries = summarize(results)
        if not summaries:
            return
        report.write_lines(summaries, self._output / "summary.jsonl")
        print(f"\n{report.table(summaries, self._titles, self._baselines)}\n")
        picture = self._output / "samples_per_second.png"
        try:
            report.draw(summaries, self._titles, self._over or "network", picture)
        except ModuleNotFoundError:
            print('no picture: pip install -e ".[scripts]" brings matplotlib', file=sys.stderr)
        print(f"results.jsonl, summary.jsonl and {picture.name} are in {self._output}")


def settings_for(cfg: DictConfig, job: Job) -> dict[str, Any]:
    """All that a job's result depends on, resolved but for the environment."""
    read = ("contender", "module", "data", *_WORKLOAD)
    resolved = configs.resolved(read_by(OmegaConf.merge(cfg, {"seed": job.seed}), read))
    module = resolved["module"]
    if cfg.speed_lr is not None and module.get("optimizer"):
        module["optimizer"] = module["optimizer"] | {"lr": cfg.speed_lr}
    return {
        "contender": resolved["contender"][job.contender],
        "module": module,
        "data": resolved["data"],
        "workload": {key: resolved[key] for key in _WORKLOAD},
    }


def _told(result: Result) -> str:
    where = f"{result.setting}: {result.contender}, seed {result.seed}"
    if result.speed is None:
        return f"{where}: failed on {result.error}"
    return f"{where}: {result.speed.samples_per_second:.0f} samples/s"


def _baselines(asked: Sequence[str] | None, contenders: Collection[str]) -> list[str]:
    if asked is None:
        return [name for name in (LIMIT, "ddp") if name in contenders]
    unknown = [name for name in asked if name not in contenders]
    if unknown:
        raise ValueError(
            f"baselines got {unknown}; allowed are the contenders: {', '.join(contenders)}."
        )
    return list(asked)


def _refuse_on_cluster(cfg: DictConfig) -> None:
    if cfg.sweep.over not in (None, "stall", "slow") or cfg.minutes is not None:
        raise ValueError(
            "On a cluster network and hosts are what they are, and each worker has its own clock."
            " Leave out sweep=bandwidth, sweep=workers and minutes."
        )


def _refuse_to_emulate(cfg: DictConfig) -> None:
    if cfg.accelerator == "gpu":
        raise ValueError(
            "accelerator got gpu, but emulated hosts would share one. Start it with torchrun on"
            " machines that have their own, or set accelerator=cpu."
        )
    if (reason := emulation.unavailable()) is not None:
        raise ValueError(
            f"Hosts cannot be emulated: {reason}. Or start it with torchrun on a cluster."
        )


def _check_numbers(cfg: DictConfig) -> None:
    for name in ("tau", "steps", "threads"):
        cfg[name] = require_count(name, cfg[name], "threads" if name == "threads" else "steps")
    if cfg.steps % cfg.tau:
        raise ValueError(
            f"steps got {cfg.steps}; allowed are multiples of tau={cfg.tau}, so that every"
            " contender is measured over whole periods."
        )
    if cfg.speed_lr is not None and not (_is_number(cfg.speed_lr) and cfg.speed_lr > 0):
        raise ValueError(f"speed_lr got {cfg.speed_lr!r}; allowed are null and a number above 0.")
    if not (_is_number(cfg.pace) and cfg.pace >= 0):
        raise ValueError(f"pace got {cfg.pace!r}; allowed are seconds from 0 on.")
    if cfg.minutes is not None and not (_is_number(cfg.minutes) and cfg.minutes > 0):
        raise ValueError(f"minutes got {cfg.minutes!r}; allowed are null and a number above 0.")
    if cfg.accelerator not in ("cpu", "gpu"):
        raise ValueError(f"accelerator got {cfg.accelerator!r}; allowed are cpu and gpu.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
