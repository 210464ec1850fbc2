"""A search by Optuna that ends runs early and goes on where it was, as a sweeper of Hydra.

hydra-optuna-sweeper, which reads the search space and brings the samplers, knows of a run only the
number that it returns: it cannot record one as ended early, begins its folders anew where a study
goes on, leaves runs that were stopped as running for ever, and ends by an error where no run
succeeded. Hydra finds sweepers in packages of this name alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    import optuna

logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna imports it, and it is talkative


class Search(Sweeper):
    """Asks Optuna for settings and runs them, until enough runs have ended.

    Args:
        sampler: chooses settings.
        pruner: ends runs early; None: none ends so.
        direction: maximize or minimize.
        n_trials: runs in all, those of earlier starts included.
        n_jobs: runs that are launched at a time.
        params: the search space: ranges in Hydra's words, by key.
    """

    def __init__(
        self,
        *,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner | None,
        direction: str,
        n_trials: int,
        n_jobs: int,
        params: DictConfig,
    ) -> None:
        self._sampler, self._pruner, self._direction = sampler, pruner, direction
        self._trials, self._at_a_time, self._params = n_trials, n_jobs, params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra composed, and how jobs are launched."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run what is left to run.

        Raises:
            ValueError: the search is not possible, or not with what was typed.
        """
        from searching import ended_jobs, study_of

        self._require_possible()
        space, fixed = self._read(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        with _alone_in(folder):
            self._require_same(folder, space, fixed)
            if ended_jobs(folder):
                self._sampler.reseed_rng()  # else a seed would draw what it drew before
            while (left := self._trials - len(ended_jobs(folder))) > 0:
                study = study_of(folder, self._direction, space, self._sampler)
                trials = [study.ask(space) for _ in range(min(left, self._at_a_time))]
                self._run(folder, [trial.params for trial in trials], fixed)

    def _run(self, folder: Path, settings: Sequence[dict[str, Any]], fixed: Sequence[str]) -> None:
        """Each in a folder of its own, beside those of runs that were stopped."""
        from going_on import search_again
        from searching import TRIAL, ended_jobs

        taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        first, before = max(taken, default=-1) + 1, len(ended_jobs(folder))
        jobs = []
        for number, params in enumerate(settings, first):
            (folder / str(number)).mkdir()
            (folder / str(number) / TRIAL).write_text(json.dumps(params))
            chosen = (f"{key}={_typed(value)}" for key, value in params.items())
            jobs.append([*fixed, *chosen, f"hydra.sweep.subdir={number}"])
        try:
            returned = self.launcher.launch(jobs, initial_job_idx=first)
        except (KeyboardInterrupt, SystemExit):
            left = self._trials - len(ended_jobs(folder))
            print(f"\nThe search was stopped; {left} of {self._trials} runs are left.")
            print(f"  to go on    {search_again(folder)}", flush=True)
            raise
        for job in returned:
            _ = job.return_value  # raises what nobody foresaw
        if len(ended_jobs(folder)) < before + len(jobs):
            raise RuntimeError(f"A run ended and left no job.json in its folder below {folder}.")

    def _require_possible(self) -> None:
        import optuna
        from launching import is_worker

        known = (optuna.pruners.PercentilePruner, optuna.pruners.ThresholdPruner)
        if is_worker():
            raise ValueError(
                "A search starts its workers itself. Start it without torchrun or srun; with"
                " launcher=slurm its runs are Slurm's jobs."
            )
        if self.config.get("objective") is None:
            raise ValueError(
                "A search needs objective=NAME, the number that it optimizes, such as"
                " objective=val/accuracy."
            )
        if self._direction not in ("maximize", "minimize"):
            raise ValueError(
                f"hydra.sweeper.direction={self._direction} is not possible. Allowed are maximize"
                " and minimize."
            )
        if not isinstance(self._sampler, optuna.samplers.BaseSampler):  # it is still to be made
            raise ValueError(
                "hydra/sweeper/sampler=grid is not possible. All combinations are what a sweep"
                " without hparams_search runs: -m strategy.tau=1,4,16"
            )
        if self._pruner is not None and not isinstance(self._pruner, known):
            raise ValueError(
                f"hydra.sweeper.pruner got {type(self._pruner).__name__}. Allowed are Optuna's"
                " MedianPruner, PercentilePruner and ThresholdPruner, and null: others keep"
                " something of each run in Optuna's own storage."
            )

    def _read(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        """What is looked for, by key, and what all runs have in common, as typed."""
        from hydra_plugins.hydra_optuna_sweeper._impl import (
            create_optuna_distribution_from_override,
        )

        params = [f"{key}={value}" for key, value in self._params.items()]
        overrides = OverridesParser.create().parse_overrides([*params, *arguments])
        last = {each.key_or_group: each for each in overrides}
        space = {
            each.get_key_element(): create_optuna_distribution_from_override(each)
            for each in last.values()
            if each.is_sweep_override()
        }
        if not space:
            raise ValueError(
                "The search has nothing to look for: all keys of hydra.sweeper.params are set."
                " Type one as a range, such as 'optimizer.lr=tag(log, interval(0.01, 0.3))'."
            )
        fixed = [each for each in overrides if not last[each.key_or_group].is_sweep_override()]
        return space, [each.input_line for each in fixed if not each.is_sweep_override()]

    def _require_same(self, folder: Path, space: dict[str, Any], fixed: Sequence[str]) -> None:
        """Refuse to compare with runs of an earlier start that were told something else."""
        from searching import read

        now = [
            *fixed,
            *(f"{key} in {distribution}" for key, distribution in space.items()),
            f"objective: {self.config.objective}, {self._direction}",
        ]
        before = read(folder / "search.json", now)
        then_only = [each for each in before if each not in now]
        now_only = [each for each in now if each not in before]
        if then_only or now_only:
            raise ValueError(
                f"The search in {folder} began with another command, so that its runs cannot be"
                f" compared: then {', '.join(then_only) or 'nothing else'}; now"
                f" {', '.join(now_only) or 'nothing else'}. Type the first command again, or"
                " another hydra.sweep.dir."
            )
        (folder / "search.json").write_text(json.dumps(now, indent=2))


def _typed(value: Any) -> str:
    """As Hydra's parser reads it."""
    return "null" if value is None else str(value)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder while a search goes on in it; the end of the process lets go of it."""
    import fcntl  # not on Windows, where Hydra looks into this module, too

    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise ValueError(
            f"A search goes on in {folder}, or its last workers are ending. Wait for its end, or"
            " type another hydra.sweep.dir."
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(opened)
