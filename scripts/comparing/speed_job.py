"""One worker's part of a job that measures speed alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, DistributedSampler

from comparing.center import is_apart
from comparing.contender import Contender
from comparing.counting import interface_towards, peak_resident_bytes, resident_bytes
from comparing.meeting import Meeting
from comparing.meter import Measurement, Meter, Pace, Stalls, Window
from comparing.result import Job
from lightning_easgd.communication import leave_all_groups

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a trainer that says nothing and leaves nothing."""

_PATIENCE_SECONDS = 600.0
_EVERY_STEP_SHARE = 8
"""Who exchanges at every step is measured over an eighth of the steps, which says as much."""


def window(contender: Contender, steps: int, job: Job) -> Window:
    """Which steps are measured."""
    # From the end of a round: as many bytes and waits as belong to the steps.
    first = 2 * (job.tau or 1) + contender.warm_up
    if contender.period == 1 and not job.stall:
        return Window(2, max(1, steps // _EVERY_STEP_SHARE))
    return Window(first, steps)


def measure(
    data: pl.LightningDataModule, job: Job, settings: Mapping[str, Any], port: int
) -> dict[str, Any]:
    """What this worker measures, in a process of its own.

    Args:
        data: which is set up.
        job: what to run.
        settings: all that its result depends on.
        port: the first of two on MASTER_ADDR that nobody uses.
    """
    memory, workload = resident_bytes(), settings["workload"]
    os.environ["MASTER_PORT"] = str(port + 1)
    torch.set_num_threads(workload["threads"])
    meeting = Meeting(port, _PATIENCE_SECONDS)
    torch.manual_seed(job.seed)  # equal weights on all workers
    module = instantiate(OmegaConf.create(settings["module"]))
    torch.manual_seed(1000 * (job.seed + 1) + meeting.rank)  # and their own dropout masks
    batches = _share(data, meeting, job.seed)
    contender = Contender(**settings["contender"])
    meter, period, coupled = _fit(contender, module, job, batches, meeting, workload)
    found = Measurement(
        steps=len(meter.step_seconds),
        samples=len(meter.step_seconds) * (batches.batch_size or 1),
        seconds=meter.seconds,
        step_seconds=meter.step_seconds,
        waits=meter.waits,
        sent_bytes=meter.sent_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        peak_bytes=_peak_bytes() - (memory if workload["accelerator"] == "cpu" else 0),
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        period=period,
        coupled=coupled,
    )
    meeting.leave()
    leave_all_groups()
    return found.to_json()


def _fit(
    contender: Contender,
    module: pl.LightningModule,
    job: Job,
    batches: DataLoader[Any],
    meeting: Meeting,
    workload: Mapping[str, Any],
) -> tuple[Meter, int | None, bool]:
    """Train for the steps that are measured.

    Returns:
        The counters, the period in the end, and whether exchanges keep the workers together.
    """
    strategy, callbacks = contender.make()
    measured = window(contender, workload["steps"], job)
    interface = interface_towards(os.environ["MASTER_ADDR"])
    waited = _waited(strategy, callbacks)
    meter = Meter(measured, interface, waited)
    last = meeting.rank == meeting.size - 1
    coupled = contender.period is not None and not is_apart(strategy)
    together = _Together(meeting, measured, coupled=coupled)
    trainer = pl.Trainer(
        accelerator=workload["accelerator"],
        strategy=strategy,
        callbacks=[
            *(*callbacks, together, Stalls(job.stall, f"{job.seed} {meeting.rank}")),
            *(Pace(workload["pace"], job.slow if last else 1.0, waited), meter),
        ],
        max_epochs=-1,
        max_steps=measured.total if coupled else -1,
        **QUIET,
        **(size() if isinstance(strategy, ParallelStrategy) else {"devices": 1}),
    )
    trainer.fit(module, batches)
    telemetry = getattr(strategy, "telemetry", None)
    return meter, telemetry.tau if telemetry else contender.period, coupled


def _share(data: pl.LightningDataModule, meeting: Meeting, seed: int) -> DataLoader[Any]:
    """This worker's training data, the same under every contender."""
    batches = data.train_dataloader()
    sampler = DistributedSampler(batches.dataset, meeting.size, meeting.rank, seed=seed)
    return DataLoader(
        batches.dataset,
        batch_size=batches.batch_size,
        sampler=sampler,
        collate_fn=batches.collate_fn,
        drop_last=True,
    )


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


def size() -> dict[str, int]:
    """How many workers there are, for a trainer."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}


def _waited(strategy: Strategy, callbacks: list[pl.Callback]) -> Callable[[], float | None]:
    """Tells how long this worker has waited for exchanges, if anything counts it."""

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
