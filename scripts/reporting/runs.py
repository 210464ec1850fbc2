"""The runs below some folders: what each was told, reached and cost, or why that is not known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sweeping
from omegaconf import OmegaConf
from seeing.screen import end

from lightning_easgd.algorithms import EASGD
from lightning_easgd.algorithms.elastic import stability_bound
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.strength import DEFAULT_BETA, Strength

_LEFT_BY_RUNS = ("report.json", "job.json", "error.log", "steps")
_READ = (
    *("strategy", "workers", "tau", "strength", "rule", "learning_rate", "model", "data"),
    *("versions", "tested", "logged", "train_seconds", "bytes_sent", "ddp_bytes_sent"),
)
_EXACT = (None, "bf16", "fp16", "int8")
"""Codecs under which a value waits for no later exchange, so that they move no border."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of train.py."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    """What was typed for it."""
    report: dict[str, Any]
    """Empty if there is none."""
    problem: str | None
    """Why there is none, or none to be read."""
    seconds: float | None

    @cached_property
    def tau(self) -> float | None:
        """As it was set, or the default; None where there is none, or it changed with time."""
        tau = self._strategy.get("tau")
        if tau is None and "tau" in self._strategy:
            tau = self.report.get("tau")
        return tau if is_number(tau) else None

    @cached_property
    def beta(self) -> float | None:
        """β at the start, of a number for β, α or ρ; None where there is none, or none known."""
        if not self.report:
            return self._beta_that_was_set()
        kind, _, text = (self.report["strength"] or "").partition("=")
        try:
            value = float(text)
        except ValueError:  # no pull, or a schedule
            return None
        lr, workers = self.report["learning_rate"] or 0.0, self.report["workers"]
        return float(workers * Strength(kind, value).alpha(value, lr, workers))  # type: ignore[arg-type]

    def _beta_that_was_set(self) -> float | None:
        given = {kind: self._strategy.get(kind) for kind in ("beta", "alpha", "rho")}
        if "beta" in self._strategy and all(value is None for value in given.values()):
            return DEFAULT_BETA
        return given["beta"] if is_number(given["beta"]) else None

    @cached_property
    def border(self) -> float | None:
        """The β at and above which EASGD is not stable; None where that is not known."""
        if self.report.get("rule") != repr(EASGD()) or self._strategy.get("groups") is not None:
            return None
        if self._strategy.get("compression") not in _EXACT:
            return None
        return float(self.report["workers"] * stability_bound(self.report["workers"]))

    @cached_property
    def _strategy(self) -> dict[str, Any]:
        """What is stored of its configuration."""
        path = self.folder / "config.yaml"
        stored: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
        return dict(stored.get("strategy") or {})

    def job(self) -> dict[str, Any]:
        """As the table of a sweep takes it."""
        return {
            "job": self.name,
            "overrides": self.overrides,
            "objective": None,
            "tested": self.report.get("tested", {}),
            "seconds": self.seconds,
            "bytes_sent": self.report.get("bytes_sent"),
            "pruned": False,  # a problem here: what it reached is not of a whole run
            "error": self.problem,
        }


def find(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders and below.

    Raises:
        ValueError: one is no folder, or has no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder. Give the folder of a sweep, or of runs.")
        below = {p.parent.resolve() for name in _LEFT_BY_RUNS for p in folder.rglob(name)}
        if not below:
            raise ValueError(
                f"{folder} has no run: neither it nor a folder below it has a report.json. Give the"
                " folder of a sweep, such as multirun/2026-11-29/09-46-33, or of runs of train.py."
            )
        found |= dict.fromkeys(sorted(below, key=_order))
    common = Path(os.path.commonpath([*found]))
    top = common.parent if common in found else common
    return [_read(folder, str(folder.relative_to(top))) for folder in found]


def table(runs: Sequence[Run]) -> list[list[Any]]:
    """The table that a sweep ends with, of these."""
    return sweeping.table([run.job() for run in runs])


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """What is missing, and what may not be compared."""
    keys, typed = sweeping.varied([run.overrides for run in runs])
    for run, values in zip(runs, typed, strict=True):
        if run.problem is not None:
            told = " ".join(f"{key}={values[key]}" for key in keys if key in values)
            yield f"{run.name} [{told}]: {run.problem}"
        elif run.report["bytes_sent"] is None:
            yield f"{run.name}: its bytes were not counted, so it is neither drawn nor recommended"
    ended = [run.report for run in runs if run.problem is None]
    for key in ("data", "model", "workers"):
        if len(found := sorted({str(report[key]) for report in ended})) > 1:
            yield f"The runs differ in {key}: {', '.join(found)}."
    versions = {json.dumps(report["versions"], sort_keys=True) for report in ended}
    if len(versions) > 1:
        yield f"The runs are of {len(versions)} sets of versions; see their report.json."


def _order(folder: Path) -> list[tuple[int, str]]:
    """Jobs by their number."""
    return [(int(part) if part.isdigit() else -1, part) for part in folder.parts]


def _read(folder: Path, name: str) -> Run:
    recorded = folder / ".hydra" / "overrides.yaml"
    job = _json(folder / "job.json")
    report = _json(folder / "report.json")
    problem = job.get("error") or _problem(folder, report)
    return Run(
        name=name,
        folder=folder,
        overrides=tuple(map(str, OmegaConf.load(recorded))) if recorded.exists() else (),
        report=report if problem is None else {},
        problem=problem,
        seconds=job.get("seconds", report.get("train_seconds")),
    )


def _problem(folder: Path, report: dict[str, Any]) -> str | None:
    if not (folder / "report.json").exists():
        how = end(folder) or "has not ended"
        return f"no report.json, for the run {how}"
    if not report:
        return "report.json cannot be read"
    if missing := [name for name in _READ if name not in report]:
        return f"report.json is of another version: it lacks {', '.join(missing)}"
    return "the search ended it early" if report.get("pruned") else None


def _json(path: Path) -> dict[str, Any]:
    """What a file has; nothing if it is not there, or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
