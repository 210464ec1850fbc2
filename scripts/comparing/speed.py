"""From a configuration to results: the whole benchmark."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import configs
import emulation
from omegaconf import DictConfig, OmegaConf

from comparing import speed_report as report
from comparing.clusters import Cluster, EmulatedCluster, TorchrunCluster
from comparing.contender import Contender, choose, contenders_of
from comparing.networks import rate_of
from comparing.progress import Progress
from comparing.speed_plan import Job, Setting, jobs_of, settings_of
from comparing.speed_results import Result, Results
from comparing.summary import LIMIT, summarize

_WORKLOAD = (
    *("data", "module", "tau", "steps", "speed_lr", "accuracy"),
    *("epochs", "seed", "accelerator", "threads"),
)

_START_SECONDS_PER_HOST = 6.0
"""What it takes to start the agents, about."""


class Comparison:
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
        self._jobs = jobs_of(self._settings(), self._contenders, cfg.repetitions)

    def run(self) -> bool:
        """Measure what is left; whether nothing is left any more."""
        if _is_on_cluster() and int(os.environ["RANK"]):
            for job in self._jobs:
                self._here.run(job)
            return True
        resolved = configs.resolved(self._cfg)
        results = Results(self._output, {key: resolved[key] for key in _WORKLOAD})
        if _is_on_cluster() and list(results):
            raise ValueError(
                f"{self._output} has results, and on a cluster they are not gone on with. Set"
                " another hydra.run.dir."
            )
        for name, reason in self._missing.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        left = [job for job in self._jobs if job not in results]
        done = [(each.job, each.job_seconds) for each in results if each.job in self._jobs]
        progress = Progress(left, done)
        for _, jobs in groupby(left, key=lambda job: job.setting):
            if not self._run_setting(list(jobs), results, progress):
                break
        self._report(results)
        return all(job in results for job in self._jobs)

    def _settings(self) -> list[Setting]:
        cfg = self._cfg
        if _is_on_cluster():
            _refuse_on_cluster(cfg)
            here = Setting("cluster", int(os.environ["WORLD_SIZE"]), cfg.stall)
            return settings_of(here, self._over, cfg.sweep["values"])
        asked = Setting(cfg.network, cfg.hosts, cfg.stall)
        settings = settings_of(asked, self._over, cfg.sweep["values"])
        for setting in settings:
            rate_of(setting.network)
        _refuse_to_emulate(cfg)
        return settings

    def _run_setting(self, jobs: Sequence[Job], results: Results, progress: Progress) -> bool:
        """Run jobs of one setting; False when time is up."""
        start = _START_SECONDS_PER_HOST * jobs[0].setting.hosts
        if self._is_too_late(jobs[0], progress, start):
            return False
        if _is_on_cluster():
            return self._run_jobs(self._here, jobs, results, progress)
        config = self._output / "resolved.yaml"
        configs.save(self._cfg, config)
        with EmulatedCluster(
            jobs[0].setting,
            config,
            self._output / "logs",
            timeout=self._cfg.job_timeout,
            threads=self._cfg.threads,
        ) as cluster:
            return self._run_jobs(cluster, jobs, results, progress)

    def _run_jobs(
        self, cluster: Cluster, jobs: Sequence[Job], results: Results, progress: Progress
    ) -> bool:
        for job in jobs:
            if self._is_too_late(job, progress):
                return False
            progress.begin(job)
            workers = cluster.run(job)
            assert workers is not None, "worker 0 gets all measurements"
            batch_size = self._cfg.data.batch_size
            result = Result.of(
                job,
                workers,
                batch_size=batch_size,
                job_seconds=progress.job_seconds,
            )
            results.add(result)
            progress.end(job, f"{result.samples_per_second:.0f} samples/s")
        return True

    @cached_property
    def _here(self) -> Cluster:
        """This process as one of the cluster's."""
        from comparing.speed_job import Workbench

        return TorchrunCluster(Workbench(self._cfg), self._cfg.port)

    def _is_too_late(self, job: Job, progress: Progress, start: float = 0.0) -> bool:
        minutes = self._cfg.minutes
        end = progress.elapsed + start + progress.expected([job])
        return minutes is not None and end > 60 * minutes

    def _report(self, results: Results) -> None:
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
    if cfg.sweep.over not in (None, "stall") or cfg.minutes is not None:
        raise ValueError(
            "On a cluster network and hosts are what they are, and results are not gone on with."
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
    for name in ("tau", "steps", "epochs", "threads"):
        if isinstance(cfg[name], bool) or not isinstance(cfg[name], int) or cfg[name] < 1:
            raise ValueError(f"{name} got {cfg[name]!r}; allowed is a whole number from 1 on.")
    if cfg.steps % cfg.tau:
        raise ValueError(
            f"steps got {cfg.steps}; allowed are multiples of tau={cfg.tau}, so that every"
            " contender is measured over whole periods."
        )
    if cfg.speed_lr is not None and not (_is_number(cfg.speed_lr) and cfg.speed_lr > 0):
        raise ValueError(f"speed_lr got {cfg.speed_lr!r}; allowed are null and a number above 0.")
    if cfg.minutes is not None and not (_is_number(cfg.minutes) and cfg.minutes > 0):
        raise ValueError(f"minutes got {cfg.minutes!r}; allowed are null and a number above 0.")
    if cfg.accelerator not in ("cpu", "gpu"):
        raise ValueError(f"accelerator got {cfg.accelerator!r}; allowed are cpu and gpu.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_on_cluster() -> bool:
    return "WORLD_SIZE" in os.environ
