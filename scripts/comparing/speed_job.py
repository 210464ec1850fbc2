"""One worker's part of a job."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from omegaconf import DictConfig
from torch.utils.data import DataLoader, DistributedSampler

from comparing.contender import Contender, contenders_of
from comparing.counting import interface_towards, peak_resident_bytes, resident_bytes
from comparing.meeting import Meeting
from comparing.meter import Measurement, Meter, Stalls, Window
from comparing.speed_plan import Job, Setting
from lightning_easgd.communication import leave_all_groups

_EVERY_STEP_SHARE = 8
"""Who exchanges at every step is measured over an eighth of the steps, which says as much."""


def make_module(cfg: DictConfig) -> pl.LightningModule:
    """What all contenders train: at the learning rate for speed, unless accuracy is asked for."""
    trains = cfg.accuracy or cfg.speed_lr is None
    module: pl.LightningModule = instantiate(
        cfg.module, **({} if trains else {"optimizer": {"lr": cfg.speed_lr}})
    )
    return module


class Workbench:
    """What all jobs of a process share: the contenders, the data, how modules are made.

    Args:
        cfg: the resolved configuration of conf/benchmark.yaml.
    """

    def __init__(self, cfg: DictConfig) -> None:
        for name in ("", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)  # workers are forked from here, which no thread would survive
        self.cfg = cfg
        self.contenders = contenders_of(cfg.contender)
        data = instantiate(cfg.data)
        data.prepare_data()
        data.setup("fit")
        self._train, self._test = data.train_dataloader(), data.test_dataloader()

    def window(self, contender: Contender, setting: Setting) -> Window:
        """Which steps are measured."""
        # From the end of a round: as many bytes and waits as belong to the steps.
        first = 2 * self.cfg.tau
        if self.cfg.accuracy:
            images = len(self._train.dataset)
            steps = self.cfg.epochs * images / (self.cfg.data.batch_size * setting.hosts)
            rounds = max(3, math.ceil(steps / self.cfg.tau))
            return Window(first, rounds * self.cfg.tau - first)
        if contender.period == 1 and not setting.stall:
            return Window(2, max(1, self.cfg.steps // _EVERY_STEP_SHARE))
        return Window(first + contender.warm_up, self.cfg.steps)

    def measure(self, job: Job, port: int) -> list[dict[str, Any]] | None:
        """Take part in a job, in a process of its own.

        Args:
            job: what to run.
            port: the first of two on MASTER_ADDR that nobody uses.

        Returns:
            On worker 0 the measurements of all workers; None on the others.
        """
        memory = resident_bytes()
        os.environ["MASTER_PORT"] = str(port + 1)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # which is on another port
        torch.set_num_threads(self.cfg.threads)
        meeting = Meeting(port, self.cfg.job_timeout)
        contender = self.contenders[job.contender]
        module = self._module(meeting.rank, job.repetition)
        meter, period = self._fit(contender, module, job, meeting)
        found = Measurement(
            steps=len(meter.step_seconds),
            seconds=meter.seconds,
            step_seconds=meter.step_seconds,
            waits=meter.waits,
            sent_bytes=meter.sent_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            peak_bytes=_peak_bytes() - (memory if self.cfg.accelerator == "cpu" else 0),
            parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
            period=period,
            accuracy=self._accuracy(module) if self.cfg.accuracy and not meeting.rank else None,
        )
        everybody = meeting.gather("measurement", found.to_json())
        leave_all_groups()
        return everybody

    def _module(self, rank: int, repetition: int) -> pl.LightningModule:
        seed = self.cfg.seed + 1000 * repetition
        torch.manual_seed(seed)  # equal weights on all workers
        module = make_module(self.cfg)
        torch.manual_seed(seed + 1 + rank)  # and their own dropout masks
        return module

    def _fit(
        self, contender: Contender, module: pl.LightningModule, job: Job, meeting: Meeting
    ) -> tuple[Meter, int | None]:
        strategy, callbacks = contender.make()
        window = self.window(contender, job.setting)
        interface = interface_towards(os.environ["MASTER_ADDR"])
        meter = Meter(window, interface, _waited(strategy, callbacks))
        coupled = contender.period is not None or self.cfg.accuracy  # then at equal samples
        stalls = Stalls(job.setting.stall, f"{self.cfg.seed} {job.repetition} {meeting.rank}")
        trainer = pl.Trainer(
            accelerator=self.cfg.accelerator,
            strategy=strategy,
            callbacks=[*callbacks, _Together(meeting, window, coupled=coupled), stalls, meter],
            max_epochs=-1,
            max_steps=window.total if coupled else -1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **_size(strategy),
        )
        trainer.fit(module, self._share(meeting, job.repetition))
        telemetry = getattr(strategy, "telemetry", None)
        return meter, telemetry.tau if telemetry else contender.period

    def _share(self, meeting: Meeting, repetition: int) -> DataLoader[Any]:
        """This worker's training data, the same under every contender."""
        images = self._train.dataset
        sampler = DistributedSampler(
            images, meeting.size, meeting.rank, seed=self.cfg.seed + repetition
        )
        return DataLoader(
            images,
            batch_size=self.cfg.data.batch_size,
            sampler=sampler,
            collate_fn=self._train.collate_fn,
            drop_last=True,
        )

    @torch.no_grad()
    def _accuracy(self, module: pl.LightningModule) -> float:
        module.eval().cpu()
        right = total = 0
        for images, labels in self._test:
            right += int((module(images).argmax(1) == labels).sum())
            total += len(labels)
        return right / total


class _Together(pl.Callback):
    """Lets all workers begin to train at the same time, and share the machine until all are done.

    Workers that nothing keeps together drift apart. Those that end first would leave a larger share
    of the machine's processors to the others, whose steps are still measured.

    Args:
        meeting: of the workers.
        window: what is measured.
        coupled: whether exchanges keep the workers together.
    """

    def __init__(self, meeting: Meeting, window: Window, *, coupled: bool) -> None:
        self._meeting = meeting
        self._last = window.total
        self._coupled = coupled

    def on_train_start(self, *_: Any) -> None:
        """When everything is set up."""
        self._meeting.meet("start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After each batch."""
        if self._coupled or trainer.global_step < self._last:
            return
        if trainer.global_step == self._last:
            self._meeting.arrive("end")
        trainer.should_stop = self._meeting.arrived("end")


def _size(strategy: Strategy) -> dict[str, int]:
    if not isinstance(strategy, ParallelStrategy):
        return {"devices": 1}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}


def _waited(strategy: Strategy, callbacks: list[pl.Callback]) -> Callable[[], float | None]:
    """Tells how long this worker has stood still for exchanges, if anything counts it."""

    def seconds() -> float | None:
        for source in (getattr(strategy, "telemetry", None), *callbacks):
            found: float | None = getattr(source, "wait_seconds", None)
            if found is not None:
                return found
        return None

    return seconds


def _peak_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()
