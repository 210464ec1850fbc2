"""What an exchange costs training, on emulated hosts.

Jobs differ in speed by more than that. So steps with exchanges and steps without take turns within
a job, and what varies slowly cancels.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparing.clusters import ClusterError, EmulatedCluster
from comparing.networks import Setting, rate_of
from comparing.progress import Progress
from comparing.result import Job
from comparing.speed import settings_for
from comparing.speed_plan import jobs_of
from comparing.work import Workbench
from emulation import EmulationError
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

_CONF = Path(__file__).parents[2] / "conf"
_NAME = "exchanges"
_ROUNDS = 4
_TOLD = (8, 16, 32, 64)


@dataclass(frozen=True)
class Turns:
    """A period: rounds of τ steps, then as many steps without an exchange, and so on.

    Args:
        tau: steps of a round.
        rounds: in a row.
    """

    tau: int
    rounds: int = _ROUNDS

    def __call__(self, step: int) -> int:
        """Steps from an exchange at ``step`` to the next."""
        turn = step % (2 * self.block)
        return self.tau if turn < self.block - self.tau else 2 * self.block - turn

    @property
    def block(self) -> int:
        """Steps with exchanges, and as many without."""
        return self.tau * self.rounds

    def costs(self, step_seconds: Sequence[float]) -> list[float]:
        """What an exchange cost in each block with exchanges, in steps.

        Args:
            step_seconds: from the first step of a block without exchanges on, which also ends it.
        """
        starts = range(0, len(step_seconds), self.block)
        blocks = [statistics.fmean(step_seconds[i : i + self.block]) for i in starts]
        triples = zip(blocks[::2], blocks[1::2], blocks[2::2], strict=False)
        return [self.tau * (2 * busy / (before + after) - 1) for before, busy, after in triples]


def exchange(
    network: str, hosts: int, tau: int, pairs: int, repetitions: int, data: str, folder: str
) -> None:
    """Print what an exchange costs training, in steps, and how much longer that makes it."""
    try:
        if tau < 1 or pairs < 1:
            raise ValueError(f"tau got {tau} and pairs {pairs}; allowed are whole numbers from 1.")
        rate_of(network)
        jobs = jobs_of([Setting(network, hosts).check()], {_NAME: tau}, repetitions)
        _exchange(_config(Turns(tau), pairs, data), jobs, Path(folder))
    except (ValueError, EmulationError, ClusterError) as error:
        sys.exit(f"error: {error}")


def _exchange(cfg: DictConfig, jobs: Sequence[Job], folder: Path) -> None:
    turns, setting = Turns(cfg.tau), jobs[0].setting
    work = Workbench(cfg.data).work
    costs: list[float] = []
    seconds: list[float] = []
    progress = Progress()
    with EmulatedCluster(
        setting, work, folder / "logs", timeout=cfg.job_timeout, threads=cfg.threads
    ) as cluster:
        for number, job in enumerate(jobs, 1):
            began = progress.elapsed
            workers = cluster.run(job, settings_for(cfg, job))
            steps = _mean_over_workers([worker["speed"] for worker in workers])
            found = turns.costs(steps)
            told = progress.end(job, progress.elapsed - began, jobs[number:])
            print(f"{told} an exchange costs {statistics.fmean(found):.3f} steps")
            costs += found
            seconds.append(statistics.median(steps))
    _tell(costs, statistics.median(seconds), turns, setting)


def _config(turns: Turns, pairs: int, data: str) -> DictConfig:
    steps = (2 * pairs + 1) * turns.block
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        cfg = compose(
            "benchmark",
            [f"tau={turns.tau}", f"steps={steps}", f"data={data}", "contender=[easgd]"],
        )
    warm_up = turns.block - 2 * turns.tau  # the first block has its exchanges, but is not measured
    strategy = {"tau": {"_target_": f"{Turns.__module__}.Turns", "tau": turns.tau}}
    OmegaConf.set_struct(cfg, False)
    easgd = cfg.contender.pop("easgd")
    cfg.contender[_NAME] = OmegaConf.merge(easgd, {"strategy": strategy, "warm_up": warm_up})
    return cfg


def _mean_over_workers(workers: Sequence[dict[str, Any]]) -> list[float]:
    each = [worker["step_seconds"] for worker in workers]
    return [statistics.fmean(step) for step in zip(*each, strict=True)]


def _tell(costs: Sequence[float], step: float, turns: Turns, setting: Setting) -> None:
    mean = statistics.fmean(costs)
    error = statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.inf
    longer = ", ".join(f"{mean / tau:.1%} at τ = {tau}" for tau in _TOLD)
    print(
        f"{setting}: {len(costs)} x {turns.block} steps with an exchange every {turns.tau},"
        " each between as many without one"
    )
    print(f"  a step       {1e3 * step:8.1f} ms, median")
    print(f"  an exchange  {1e3 * mean * step:8.1f} ms, {mean:.3f} ± {error:.3f} steps")
    print(f"  so training takes longer by {longer}")
