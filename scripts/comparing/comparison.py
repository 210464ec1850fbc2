"""From a configuration to results: the whole comparison."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import configs
from omegaconf import DictConfig, OmegaConf

from comparing import report
from comparing.job import Job, Result, Workbench

_WORKLOAD = ("data", "module", "workers", "epochs")


class Comparison:
    """Contenders over periods and seeds, as configured.

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
        self._settings = {job: self._settings_of(job) for job in self._jobs()}

    def run(self) -> None:
        """Train what is left, and report all."""
        found = self._known()
        left = [job for job in self._settings if job not in found]
        bench = Workbench(self._cfg) if left else None
        for number, job in enumerate(left):
            assert bench is not None
            found[job] = bench.run(job, self._settings[job])
            with self._path.open("a") as file:
                print(json.dumps(asdict(found[job])), file=file)
            seconds = statistics.fmean(result.seconds for result in found.values())
            minutes = (len(left) - number - 1) * seconds / 60
            print(
                f"[{len(self._settings) - len(left) + number + 1}/{len(self._settings)}]"
                f" {report.told(found[job])}; about {minutes:.0f} min left",
                flush=True,
            )
        self._report([found[job] for job in self._settings])

    def _jobs(self) -> Iterator[Job]:
        """Seeds outermost, so that what was stopped early has all contenders."""
        for seed in range(self._cfg.seeds):
            for name, config in self._cfg.compared.items():
                has_period = "${tau}" in OmegaConf.to_yaml(config)
                for tau in self._cfg.taus if has_period else [None]:
                    yield Job(name, tau, self._cfg.seed + seed)

    def _settings_of(self, job: Job) -> dict[str, Any]:
        """The contender's configuration with the job's period, and the workload with its seed."""
        cfg = OmegaConf.merge(self._cfg, {"tau": job.tau or 1, "seed": job.seed})
        resolved = configs.resolved(cfg)
        workload = {key: resolved[key] for key in _WORKLOAD}
        return resolved["compared"][job.contender] | {"workload": workload}

    def _known(self) -> dict[Job, Result]:
        """What earlier runs found for jobs that are asked for, with the settings of now."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text().splitlines()
        results = [Result(**json.loads(line)) for line in lines]
        return {r.job: r for r in results if self._settings.get(r.job) == r.settings}

    def _report(self, results: list[Result]) -> None:
        titles = {name: config.title for name, config in self._cfg.compared.items()}
        print(f"\n{report.table(results, titles)}\n")
        picture = self._path.with_name("accuracy.png")
        try:
            report.draw(results, titles, picture)
        except ModuleNotFoundError:
            print('no picture: pip install -e ".[scripts]" brings matplotlib', file=sys.stderr)
        print(f"results.jsonl and {picture.name} are in {picture.parent}")


def _check(cfg: DictConfig) -> None:
    numbers = {name: cfg[name] for name in ("seeds", "workers", "epochs")}
    numbers |= {f"taus[{i}]": tau for i, tau in enumerate(cfg.taus)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} got {value!r}; allowed is a whole number from 1 on.")
    if not cfg.taus or not cfg.compared:
        raise ValueError("taus and compared got nothing; name one of each or more.")
