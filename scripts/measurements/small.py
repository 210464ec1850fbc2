"""What frequent exchanges of small parameters take of a processor, on this machine alone."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_easgd import EASGDStrategy, Often
from measurements.overhead import Cheap
from measurements.runs import NEVER, Endless, fit

_FIRST = 20
_METRIC = "processor_seconds"


class Processor(pl.Callback):
    """Reports the seconds that a step took of a processor, in all threads of worker 0."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """After each batch."""
        if args[2] == _FIRST:
            self.began = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Behind the last batch; the launcher hands it to the process that waits."""
        used = time.process_time() - self.began
        trainer.callback_metrics[_METRIC] = torch.tensor(used / (trainer.global_step - _FIRST - 1))


def small(workers: int, below: int, steps: int, repetitions: int) -> None:
    """Print what an exchange at every step takes of a processor, beyond a step without one."""
    ways = {"without": None, "with": Often(tau=1, below=below)}
    steps += _FIRST + 1
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, often in ways.items():
            strategy = EASGDStrategy(
                tau=NEVER, often=often, final_exchange=False, start_method="fork"
            )
            module, loader = Cheap(), DataLoader(Endless(torch.zeros(1)), batch_size=None)
            watch = Processor()
            trainer = fit(module, loader, strategy, watch, steps=steps, devices=workers)
            used[name].append(float(trainer.callback_metrics[_METRIC]))
    costs = [more - less for more, less in zip(used["with"], used["without"], strict=True)]
    elements = [p.numel() for p in Cheap().parameters() if p.numel() < below]
    print(
        f"an exchange of {len(elements)} parameters with {4 * sum(elements) / 1e3:.0f} kB at every"
        f" step, {workers} workers over gloo on this machine, {repetitions} repetitions"
    )
    print(f"  {1e3 * statistics.median(costs):.2f} ms of a processor for each worker, median of")
    print(f"  {', '.join(f'{1e3 * cost:.2f}' for cost in costs)}  (to reach: at most 5 ms)")
