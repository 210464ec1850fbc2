"""One worker's part of a training run, and what all workers found together."""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from forking import free_port
from hydra.utils import instantiate
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf

from comparing.center import PATIENCE, is_apart, told_by_worker_0
from comparing.contender import Contender
from comparing.meeting import Meeting
from comparing.result import Job, Point, Speed, WorkerTime
from comparing.speed_job import QUIET, measure, size
from comparing.watching import Watch, WatchApart, sent_bytes
from lightning_easgd import NonFiniteError
from lightning_easgd.communication import leave_all_groups
from lightning_easgd.workloads import experiment
from lightning_easgd.workloads.report import count_bytes
from lightning_easgd.workloads.sampled import SampledData


class Workbench:
    """What all jobs of a process share: its imports, and the data.

    Args:
        data: configuration of the LightningDataModule; None: modules bring their own loaders.
    """

    def __init__(self, data: DictConfig | None) -> None:
        torch.set_num_threads(1)  # workers are forked from here, which no thread would survive
        self._data = instantiate(data) if data else None
        if self._data is not None:
            self._data.prepare_data()
            _test_in_validation(self._data)
        if isinstance(self._data, SampledData):
            self._data.setup("fit")  # it keeps what it read for all jobs

    def work(
        self, job: Job, settings: Mapping[str, Any], *, port: int | None = None
    ) -> dict[str, Any]:
        """What one worker does and counted.

        Args:
            job: what to run.
            settings: all that its result depends on.
            port: the first of two on MASTER_ADDR where workers meet; None: as MASTER_PORT says.
        """
        _quieten()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # which is on another port
        if port is not None:
            os.environ["MASTER_PORT"] = str(port)
        if "steps" in settings["workload"]:
            assert port is not None
            self._data.setup("fit")
            return {"speed": measure(self._data, job, settings, port)}
        return self._learn(job, settings)

    def _learn(self, job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
        experiment.seed(job.seed)
        if isinstance(self._data, SampledData):
            self._data.seed = job.seed  # of the shuffling, where workers see all images
        workload = settings["workload"]
        module: pl.LightningModule = instantiate(OmegaConf.create(settings["module"]))
        strategy, callbacks = Contender(**settings["contender"]).make()
        meeting = _meeting() if is_apart(strategy) else None
        points = 0 if job.tuning else workload["points"]
        watch = _watch(points, workload["metric"], meeting)
        trainer = pl.Trainer(
            accelerator=workload["accelerator"],
            strategy=strategy,
            callbacks=[*experiment.callbacks(strategy, None, job.seed), *callbacks, watch],
            max_epochs=workload["epochs"],
            check_val_every_n_epoch=None,  # moments are of the whole run
            val_check_interval=1,
            num_sanity_val_steps=0,
            **QUIET,
            **size(),
        )
        found = self._fit(trainer, module, watch, workload, tuning=job.tuning)
        if meeting is not None:
            meeting.leave()  # the server ends with worker 0
        leave_all_groups()
        return found | {
            "points": [asdict(point) for point in watch.points],
            "time": asdict(watch.time_of(trainer, _host())),
            "steps": trainer.global_step,
            "restarts": getattr(getattr(strategy, "telemetry", None), "non_finite", 0),
            "sent_bytes": sent_bytes(trainer, module),
            "ddp_bytes": count_bytes(trainer, module).get("ddp_bytes_sent"),
        }

    def _fit(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        watch: Watch,
        workload: Mapping[str, Any],
        *,
        tuning: bool,
    ) -> dict[str, Any]:
        """Train, and say what the delivered model is worth; worse than guessing is diverged."""
        try:
            trainer.fit(module, datamodule=self._data)
        except NonFiniteError as error:
            return {"diverged": str(error).split(". ")[0]}
        if is_apart(trainer.strategy) and not trainer.is_global_zero:
            watch.pass_by(trainer)
            return {}
        tested = trainer.validate(module, datamodule=self._data, verbose=False)[0]
        score = watch.keep(trainer, tested)
        kind, loss = "test", tested.get("val/loss", 0.0)
        if workload["train_loss"] and not tuning and self._data is not None:
            images = self._data.train_dataloader()
            trained = trainer.validate(module, images, verbose=False)[0]
            kind, loss = "training", trained.get("val/loss", 0.0)
        guessing = math.log(workload["classes"]) if workload["classes"] else math.inf
        if not math.isfinite(score) or not loss <= guessing:
            return {"diverged": f"the {kind} loss was {loss:.3g}, that of guessing {guessing:.3g}"}
        return {"score": score, "loss": loss if kind == "training" else None}


def gathered(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all workers of a job returned, as fields of its result."""
    first = workers[0]
    if "speed" in first:
        return {"speed": Speed.of([worker["speed"] for worker in workers])}
    points = [_mean_point([Point(**one) for one in each]) for each in _side_by_side(workers)]
    names = ("score", "loss", "diverged", "restarts", "steps")
    return {
        **{name: first[name] for name in names if name in first},
        **{
            name: _mean([worker[name] for worker in workers])
            for name in ("sent_bytes", "ddp_bytes")
        },
        "seconds": first["time"]["seconds"],
        "samples": points[-1].samples if points else None,
        "points": tuple(points),
        "workers": tuple(WorkerTime(**worker["time"]) for worker in workers),
    }


def _side_by_side(workers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """All workers' points at each of worker 0; of one that was done by then, its last."""
    found = [worker["points"] for worker in workers]
    if not all(found):
        return []
    return [[each[min(i, len(each) - 1)] for each in found] for i in range(len(found[0]))]


def _mean_point(points: Sequence[Point]) -> Point:
    first = points[0]
    return Point(
        seconds=first.seconds,
        step=first.step,
        samples=sum(point.samples for point in points),
        sent_bytes=_mean([point.sent_bytes for point in points]),
        score=first.score,
        distance=_mean([point.distance for point in points]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _meeting() -> Meeting:
    """Of workers that wait for nobody while they train."""
    return Meeting(int(told_by_worker_0(free_port)), PATIENCE.total_seconds())


def _watch(points: int, metric: str, meeting: Meeting | None) -> Watch:
    return WatchApart(points, metric, meeting) if points and meeting else Watch(points, metric)


def _test_in_validation(data: pl.LightningDataModule) -> None:
    """Have a fit validate on the test data, where there are some."""
    if not is_overridden("test_dataloader", data):
        return
    setup = data.setup

    def set_up(stage: str) -> None:
        for each in dict.fromkeys((stage, "test")):
            setup(each)

    data.setup, data.val_dataloader = set_up, data.test_dataloader  # type: ignore[method-assign]


def _host() -> str:
    emulated = "LOCAL_WORLD_SIZE" not in os.environ
    return f"host{os.environ['RANK']}" if emulated else socket.gethostname()


def _quieten() -> None:
    for name in ("", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
