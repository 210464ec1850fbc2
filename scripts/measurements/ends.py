"""The work at both ends of an exchange, the wire excluded, under every rule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from comparing.speed_plan import rotated
from forking import free_port
from torch import Tensor, nn

from lightning_easgd import CenterAverage, Rule
from lightning_easgd.algorithms import AVERAGED, RULES, choose_average
from lightning_easgd.center.center import Center
from lightning_easgd.communication import AllReduce, Level, WorkerGroup, leave_all_groups
from lightning_easgd.exchange.assembly import assemble
from lightning_easgd.exchange.exchange import Exchange
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.telemetry import Telemetry

_WARM_UP = 3
"""Repetitions that do not count."""


class Arrived:
    """What nobody has to wait for."""

    def is_completed(self) -> bool:
        """It is."""
        return True

    def wait(self) -> None:
        """Return at once."""


class NoWire(AllReduce):
    """Headers and sums that are there at once: one worker's are its own."""

    def _gather(self, mine: Tensor, everybody: Tensor) -> Any:
        everybody[0] = mine
        return Arrived()

    def sum(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Nothing is under way."""
        return []


def ends(millions: float, tensors: int, device: str, repetitions: int) -> None:
    """Print what an exchange takes beside its way, in plain copies, and each rule's to EASGD's."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    group = WorkerGroup(timedelta(minutes=1), timedelta(minutes=1))
    try:
        compare(group, millions, tensors, device, repetitions)
    finally:
        group.close()
        leave_all_groups()


@dataclass
class Contender:
    """One rule, with or without a running average."""

    exchange: Exchange
    parameters: int
    seconds: list[float] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """What it keeps from one exchange to the next besides the center and the sum, in copies."""
        fragments = [f for c in self.exchange.center.cohorts for f in c.fragments]
        tensors = [v for f in fragments for part in f.rule_state for v in part.values()]
        tensors += [part for f in fragments if f.start for part in f.start.parts]
        tensors += [p for f in fragments if f.delivered is not f.center for p in f.delivered.parts]
        return sum(tensor.numel() for tensor in tensors if tensor.dim()) / self.parameters


def compare(
    group: WorkerGroup, millions: float, tensors: int, device: str, repetitions: int
) -> None:
    """Copy and exchange in turn, as the only worker."""
    size = int(1e6 * millions) // tensors
    module = nn.ParameterList(torch.randn(size, device=device) for _ in range(tensors))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    contenders = {
        name: Contender(exchange_of(module, optimizer, group, rule, average), tensors * size)
        for name, (rule, average) in ways().items()
    }
    source = [parameter.detach().clone() for parameter in module]
    target = [torch.empty_like(tensor) for tensor in source]
    copies = []
    for repetition in range(_WARM_UP + repetitions):
        copies.append(seconds(lambda: torch._foreach_copy_(target, source), device))
        for name in rotated(contenders, repetition):
            contender = contenders[name]
            contender.seconds.append(seconds(step_of(contender.exchange, optimizer), device))
    print(f"{millions:g} M parameters in {tensors} tensors on {device}, medians of {repetitions}")
    report(copies, contenders)
    for contender in contenders.values():
        contender.exchange.drain()


def report(copies: list[float], contenders: Mapping[str, Contender]) -> None:
    """Print medians, and those of the ratios within a repetition."""
    copy, easgd = copies[_WARM_UP:], contenders["easgd"].seconds[_WARM_UP:]
    print(f"  a plain copy  {1e3 * statistics.median(copy):8.3f} ms")
    print("  both ends of an exchange     in copies  to easgd's  copies kept")
    for name, contender in contenders.items():
        whole = contender.seconds[_WARM_UP:]
        cells = [
            f"{1e3 * statistics.median(whole):10.3f} ms",
            f"{median_ratio(whole, copy):9.2f}",
            f"{median_ratio(whole, easgd):10.3f}",
            f"{contender.kept:11.2f}",
        ]
        print(f"  {name:<12}", *cells)
    print("  to reach: easgd at most 8 copies on a CPU, others that keep nothing 1.05 of easgd's")


def median_ratio(values: list[float], others: list[float]) -> float:
    """Of what stood next to each other."""
    return statistics.median(v / o for v, o in zip(values, others, strict=True))


def ways() -> dict[str, tuple[Rule, CenterAverage | None]]:
    """All rules by their names, and those of the averages."""
    plain = {name: (rule(), None) for name, rule in RULES.items()}
    averaged = {
        name: (RULES[options["algorithm"]](), choose_average(options["center_average"]))
        for name, options in AVERAGED.items()
    }
    return plain | averaged


def step_of(exchange: Exchange, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step that is nothing but an exchange."""

    def step() -> None:
        with exchange.step(optimizer):
            pass

    return step


def exchange_of(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: WorkerGroup,
    rule: Rule,
    average: CenterAverage | None,
) -> Exchange:
    """An exchange at every step, of a worker that is alone."""
    point = "iterate" if rule.elastic else "parameter"
    return assemble(
        Center(module, buffers="average", rank=0, averaging=average),
        NoWire(group, 25 * 2**20, level=Level(group.rank, group.size, None)),
        optimizers=LocalOptimizers(lambda: [optimizer]),
        rules=ExchangePolicy(Period(1), Strength("beta", 0.9), rule.overlaps, point, rule),
        telemetry=Telemetry(),
    )


def seconds(function: Callable[[], None], device: str) -> float:
    """How long a function takes, on a GPU until it is done."""
    began = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
