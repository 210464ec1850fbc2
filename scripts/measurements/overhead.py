"""The cost of a step between exchanges."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from comparing.speed_plan import rotated
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_easgd import EASGDStrategy
from lightning_easgd.workloads.models import CNN
from measurements.runs import NEVER, Endless, Stopwatch, classifier, fit


class Cheap(pl.LightningModule):
    """The CNN's parameters with next to no work in a step, so that the strategy's own shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CNN(1, 10, 28)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A gradient for the last bias only."""
        return list(self.parameters())[-1].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def overhead(repetitions: int) -> None:
    """Print the cost of a step between exchanges, as a share of a 50 ms step."""
    makers: dict[str, Callable[[], Strategy]] = {
        "single device": lambda: SingleDeviceStrategy("cpu"),
        "easgd": lambda: EASGDStrategy(tau=NEVER, final_exchange=False),
    }
    cheap = Endless(torch.zeros(1))
    batch = calibrate()
    real = Endless(torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,)))
    micro: dict[str, list[float]] = {name: [] for name in makers}
    full: dict[str, list[float]] = {name: [] for name in makers}
    for repetition in range(repetitions):
        for name in rotated(makers, repetition):
            for module, data, steps, out in (
                (Cheap(), cheap, 2000, micro),
                (classifier(), real, 40, full),
            ):
                watch = Stopwatch(first=10)
                loader = DataLoader(data, batch_size=None)
                fit(module, loader, makers[name](), watch, steps=steps)
                out[name].append(statistics.median(watch.per_batch()))
    single, easgd = (statistics.median(full[name]) for name in makers)
    ratio = statistics.median(e / s for s, e in zip(*full.values(), strict=True))
    extra = statistics.median(e - s for s, e in zip(*micro.values(), strict=True))
    print(f"a step of one worker, {repetitions} repetitions in turn, medians")
    print(f"  single device  {1e3 * single:8.3f} ms")
    print(f"  easgd          {1e3 * easgd:8.3f} ms   ratio {ratio:.4f}")
    print(f"  the strategy itself, from steps of next to no work: {1e6 * extra:+.1f} us,")
    print(f"  that is {100 * extra / 0.050:+.3f} % of a 50 ms step (to reach: at most 1 %)")


def calibrate() -> int:
    """The batch size at which one step of the CNN takes about 50 ms here."""
    watch = Stopwatch(first=5)
    data = Endless(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))
    loader = DataLoader(data, batch_size=None)
    fit(classifier(), loader, SingleDeviceStrategy("cpu"), watch, steps=20)
    return max(1, round(64 * 0.050 / statistics.median(watch.per_batch())))
