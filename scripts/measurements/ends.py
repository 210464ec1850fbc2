"""The work at both ends of an exchange, the wire excluded. Run as a file it is the one worker."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_easgd.center import Center
from lightning_easgd.communication import AllReduce, WorkerGroup
from lightning_easgd.exchange import Exchange, Rules
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.telemetry import Telemetry


class NoWire(AllReduce):
    """Sums that are there at once: one worker's are its own."""

    def _sum(self, tensors: Iterable[Tensor]) -> list[dist.Work]:
        return []


def ends(millions: float, tensors: int, device: str, repetitions: int) -> None:
    """Print what an exchange takes beside its way, in plain copies of the parameters."""
    options = [str(value) for value in (millions, tensors, device, repetitions)]
    subprocess.run(
        [sys.executable, "-m", "measurements.ends", *options],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29563"},
        check=True,
    )


def ends_of_one_worker(millions: float, tensors: int, device: str, repetitions: int) -> None:
    """Copy and exchange in turn, in this process."""
    dist.init_process_group("gloo", rank=0, world_size=1)
    size = int(1e6 * millions) // tensors
    module = nn.ParameterList(torch.randn(size, device=device) for _ in range(tensors))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    exchange = exchange_of(module, optimizer)
    source = [parameter.detach().clone() for parameter in module]
    target = [torch.empty_like(tensor) for tensor in source]

    def one_exchange() -> None:
        with exchange.step(optimizer):
            pass

    copies, exchanges = [], []
    for _ in range(3 + repetitions):
        copies.append(seconds(lambda: torch._foreach_copy_(target, source), device))
        exchanges.append(seconds(one_exchange, device))
    copy, whole = statistics.median(copies[3:]), statistics.median(exchanges[3:])
    ratio = statistics.median(e / c for e, c in zip(exchanges[3:], copies[3:], strict=True))
    print(f"{millions:g} M parameters in {tensors} tensors on {device}, medians of {repetitions}")
    print(f"  a plain copy                        {1e3 * copy:8.3f} ms")
    print(f"  both ends of an exchange            {1e3 * whole:8.3f} ms")
    print(f"  in copies, median of the ratios     {ratio:8.2f}  (to reach on a CPU: at most 8)")
    exchange.drain()


def exchange_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Exchange:
    """An exchange at every step, of a worker that is alone."""
    return Exchange(
        Center(module, buffers="average", rank=0),
        NoWire(WorkerGroup(timedelta(minutes=1), None), 25 * 2**20),
        optimizers=LocalOptimizers(lambda: [optimizer]),
        rules=Rules(Period(1), Strength("beta", 0.9)),
        telemetry=Telemetry(),
    )


def seconds(function: Callable[[], None], device: str) -> float:
    """How long a function takes, on a GPU until it is done."""
    began = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    size, number, where, times = sys.argv[1:]
    ends_of_one_worker(float(size), int(number), where, int(times))
