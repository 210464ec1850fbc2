"""Samples/s on the network between the workers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_easgd import EASGDStrategy
from lightning_easgd.workloads.data import FashionMNIST
from measurements.runs import NEVER, Stopwatch, classifier, fit, rotated


def network(repetitions: int, tau: int, steps: int, codecs: Sequence[str]) -> None:
    """Print samples/s of the contenders on the network between the workers."""
    batch, warm_up = 64, tau + 2
    makers: dict[str, Callable[[], Strategy]] = {
        "no exchange": lambda: EASGDStrategy(tau=NEVER, final_exchange=False),
        f"easgd, overlapped, tau={tau}": lambda: EASGDStrategy(tau=tau),
        f"easgd, blocking, tau={tau}": lambda: EASGDStrategy(tau=tau, overlap=False),
        "ddp": lambda: DDPStrategy(),
    }
    for codec in codecs:
        makers[f"easgd, {codec}, tau={tau}"] = partial(EASGDStrategy, tau=tau, compression=codec)
    nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rates: dict[str, list[float]] = {name: [] for name in makers}
    waits: dict[str, list[float]] = {name: [] for name in makers}
    for repetition in range(repetitions):
        for name in rotated(makers, repetition):
            # DDP's steps take long on a slow network; fewer of them say as much.
            count = warm_up + (steps // 8 if name == "ddp" else steps)
            watch, strategy = Stopwatch(first=warm_up), makers[name]()
            data = FashionMNIST(num_classes=10, in_channels=1, image_size=28, batch_size=batch)
            options = {"devices": devices, "num_nodes": nodes}
            fit(classifier(), data, strategy, watch, steps=count, **options)
            slowest = torch.tensor([watch.seconds])
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            samples = dist.get_world_size() * batch * (len(watch.ends) - 1)
            rates[name].append(samples / slowest.item())
            telemetry = getattr(strategy, "telemetry", None)
            waits[name].append(telemetry.wait_seconds if telemetry else float("nan"))
    if dist.get_rank() == 0:
        report_network(rates, waits)


def report_network(rates: dict[str, list[float]], waits: dict[str, list[float]]) -> None:
    """The table of :func:`network`."""
    print(f"{dist.get_world_size()} workers, samples/s, median (and range) of repetitions in turn")
    for name, values in rates.items():
        to_limit = ratio(values, rates["no exchange"])
        to_ddp = ratio(values, rates["ddp"])
        spread = f"({min(values):.0f}-{max(values):.0f})"
        print(
            f"  {name:<26} {statistics.median(values):7.0f} {spread:<13}"
            f" {100 * to_limit:6.1f} % of no exchange, {to_ddp:5.2f} times ddp,"
            f" waited {statistics.median(waits[name]):.2f} s"
        )


def ratio(values: list[float], others: list[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))
