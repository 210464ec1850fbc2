"""The jobs of a sweep side by side: what varied, what each reached and cost, or why it failed.

Each job leaves a record in its folder, wherever a launcher runs it. The process that started the
sweep gathers them at its end, also if it ends early.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from going_on import again
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from launching import rank_of_worker
from omegaconf import DictConfig
from searching import RECORD, VALIDATIONS, ended_jobs, is_search, read, state_of


@dataclass(frozen=True)
class _Begun:
    """A sweep that this process started."""

    folder: Path
    since: float
    """Jobs that began before are not of it."""
    direction: str | None = None
    """Of a search: maximize or minimize."""


_begun: list[_Begun] = []


class Sweep(Callback):
    """What Hydra tells of a sweep's beginning; see conf/train.yaml."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keep in mind where its jobs will be."""
        folder, hydra_cfg = Path(config.hydra.sweep.dir), config.hydra
        if is_search(hydra_cfg):  # it goes on with all that is there
            _begun.append(_Begun(folder, 0.0, hydra_cfg.sweeper.direction))
        else:
            _begun.append(_Begun(folder, time.time()))


def is_sweep() -> bool:
    """Whether this job is one of several."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def record(began: float, *, objective: object = None, error: str | None = None) -> None:
    """Leave in this job's folder what it reached and cost, if it is one of a sweep.

    Args:
        began: when it did, in seconds since the epoch.
        objective: what it returned.
        error: why it failed.
    """
    if not is_sweep() or rank_of_worker():  # of several that Slurm started for one job, the first
        return
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    found = read(folder / "report.json", {}) if error is None else {}
    values = {
        "job": hydra_cfg.job.num,
        "folder": str(folder),
        "overrides": list(hydra_cfg.overrides.task),
        "began": began,
        "seconds": round(time.time() - began, 1),
        "objective": objective,
        "tested": found.get("tested", {}),
        "bytes_sent": found.get("bytes_sent"),
        "pruned": found.get("pruned", False),
        "validations": read(folder / VALIDATIONS, []),
        "error": error,
    }
    (folder / RECORD).write_text(json.dumps(values, indent=2))


def close() -> bool:
    """Print the table of the sweep that ends, write it to ``sweep.csv``; whether no job failed."""
    if not _begun:
        return True
    begun = _begun.pop()
    folder = begun.folder
    jobs = [job for job in ended_jobs(folder) if job["began"] >= begun.since]
    if jobs:
        rows = table(jobs)
        with (folder / "sweep.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        print(f"\n{aligned([row[:-1] for row in rows])}\n\n  {folder}/sweep.csv")  # errors follow
        print(*_best(begun.direction, jobs), sep="\n")
    failed = [job for job in jobs if job["error"] is not None]
    if failed:
        lines = [
            f"  job {job['job']} [{' '.join(job['overrides'])}] in {job['folder']}: {job['error']}"
            for job in failed
        ]
        print(f"{len(failed)} job(s) of the sweep failed:", *lines, sep="\n", file=sys.stderr)
    return not failed


def _best(direction: str | None, jobs: Sequence[dict[str, Any]]) -> list[str]:
    """The best run of a search, with its command."""
    reached = [job for job in jobs if direction and state_of(job) == "COMPLETE"]
    if not reached:
        return ["  best        none: no run ended with a number"] if direction else []
    better = max if direction == "maximize" else min
    best = better(reached, key=lambda job: job["objective"])
    return [
        f"  best        job {best['job']}, {best['objective']:.4g}",
        f"  command     {again(best['overrides'])}",
    ]


def table(jobs: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A row for each job, under their names: what varied, what was reached, what it took."""
    keys, typed = varied([job["overrides"] for job in jobs])
    tested = names(job["tested"] for job in jobs)
    optimizes = any(job["objective"] is not None for job in jobs)
    prunes = any(job["pruned"] for job in jobs)
    last = [*["ended early"] * prunes, "seconds", "MB sent", "error"]
    rows = [["job", *keys, *["objective"] * optimizes, *tested, *last]]
    for job, values in zip(jobs, typed, strict=True):
        sent = job["bytes_sent"]
        rows.append(
            [
                *(job["job"], *(values.get(key, "") for key in keys)),
                *[job["objective"]] * optimizes,
                *(job["tested"].get(name) for name in tested),
                *["yes" if job["pruned"] else "no"] * prunes,
                *(job["seconds"], None if sent is None else sent / 1e6, job["error"]),
            ]
        )
    return rows


def varied(overrides: Iterable[Iterable[str]]) -> tuple[list[str], list[dict[str, str]]]:
    """The keys that not all command lines set alike, and what each sets."""
    typed = [_values(each) for each in overrides]
    return [key for key in names(typed) if len({each.get(key) for each in typed}) > 1], typed


def _values(overrides: Iterable[str]) -> dict[str, str]:
    """Of the keys that a job sets."""
    return {key: value for key, _, value in (each.lstrip("+").partition("=") for each in overrides)}


def names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of several, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of a table for a terminal."""
    cells = [[_shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in cells]
    return "\n".join(f"  {line}" for line in lines)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
