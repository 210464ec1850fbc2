"""A search's runs as Optuna sees them: all that is known of them stands in the folders of the jobs.

Optuna's own storages are databases. The version that Hydra's plugin needs reaches none of them with
the SQLAlchemy of today, and workers on other machines would need them as well.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

if TYPE_CHECKING:
    import optuna

RECORD, TRIAL, VALIDATIONS = "job.json", "trial.json", "validations.json"
"""Files in a job's folder: what came of it, which setting it is, and what validations found."""

Judge = Callable[[float], bool]
"""Takes what the next validation found; whether the run ends early."""


def is_search(hydra_cfg: DictConfig) -> bool:
    """Whether a sweep is a search; see conf/hydra/sweeper/search.yaml."""
    return "pruner" in hydra_cfg.sweeper


def ended_jobs(folder: Path) -> list[dict[str, Any]]:
    """What came of all jobs below a folder that have ended, in their order."""
    found = [read(p) | {"folder": str(p.parent.absolute())} for p in folder.rglob(RECORD)]
    return sorted(found, key=lambda job: job["job"])


def read(path: Path, default: Any = None) -> Any:
    """What a file of a job says; the default where there is none."""
    return json.loads(path.read_text()) if path.exists() else default


def study_of(
    folder: Path,
    direction: str,
    space: Mapping[str, Any] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """The jobs that have ended, for Optuna to learn from.

    Args:
        folder: of the sweep.
        direction: maximize or minimize.
        space: distributions by key; None: which settings the jobs are does not matter.
        sampler: that chooses settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, sampler=sampler)
    for job in ended_jobs(folder):
        params = read(Path(job["folder"], TRIAL)) if space else {}
        _add(study, state_of(job), job["validations"], job["objective"], params, space or {})
    return study


def _add(
    study: optuna.Study,
    state: str,
    validations: Sequence[float],
    value: float | None = None,
    params: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
) -> None:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=value if state == "COMPLETE" else None,
                params=dict(params or {}),
                distributions=dict(space or {}),
                intermediate_values=dict(enumerate(validations)),
            )
        )


def state_of(job: Mapping[str, Any]) -> str:
    """What a job came to, in Optuna's words."""
    if job["error"] is None and job["pruned"]:
        return "PRUNED"
    value = job["objective"]
    has_value = job["error"] is None and value is not None and math.isfinite(value)
    return "COMPLETE" if has_value else "FAIL"


@dataclass(frozen=True)
class Rivals:
    """The runs that a run of a search is compared with."""

    folder: Path
    """Of the sweep."""
    own: Path
    """Of this run."""
    direction: str
    pruner: Any

    @classmethod
    def of_this_job(cls) -> Rivals | None:
        """None where it is of no search, or of one that ends no run early."""
        hydra_cfg = HydraConfig.get()
        if hydra_cfg.mode != RunMode.MULTIRUN or not is_search(hydra_cfg):
            return None
        sweeper, folder = hydra_cfg.sweeper, Path(hydra_cfg.runtime.cwd, hydra_cfg.sweep.dir)
        if sweeper.pruner is None:
            return None
        return cls(folder, Path(hydra_cfg.runtime.output_dir), sweeper.direction, sweeper.pruner)

    def judge(self) -> Judge:
        """Keeps what validations find, and asks Optuna."""
        pruner, values = instantiate(self.pruner), list[float]()

        def judge(value: float) -> bool:
            values.append(value)
            (self.own / VALIDATIONS).write_text(json.dumps(values))
            study = study_of(self.folder, self.direction)
            _add(study, "RUNNING", values)
            return pruner.prune(study, study.trials[-1])

        return judge
