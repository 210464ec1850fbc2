"""From what was measured to what to take: numbers in, numbers and a verdict out.

[Note: worth] At equal samples elastic averaging is behind DDP (README, Measured), so it must be
faster by more than what measuring can tell apart before it is advised.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lightning_easgd.pace import AutomaticPeriod, Durations

WORTH = 1.05
"""The least speed-up over DDP for which another algorithm is advised."""

_NOISE, _MOST = 0.1, 0.75
_NO_BOUND = 10**9
_SPARSE = "topk"
_ACCOUNTS = {None: (0, 0), "bf16": (0, 1), "fp16": (0, 1), "int8": (1, 1), "topk": (1, 0)}
"""fp32 copies that a codec keeps: whole ones, and those shared by all workers (README)."""


@dataclass(frozen=True)
class Exchanges:
    """What exchanges in one form took; of a fragment each, if the model travels in fragments."""

    compression: str | None
    sent_bytes: int
    """By each worker, to exchange the whole model once."""
    repetitions: list[Durations]
    """As all workers together see it: see :func:`together`."""

    @property
    def durations(self) -> Durations:
        """The medians of all repetitions."""
        return Durations(
            step=round(statistics.median(found.step for found in self.repetitions)),
            exchange=round(statistics.median(found.exchange for found in self.repetitions)),
            cost=round(statistics.median(found.cost for found in self.repetitions)),
        )


@dataclass(frozen=True)
class Measured:
    """All that was measured."""

    model: str
    parameters: int
    """Elements that are trained."""
    copy_bytes: int
    """A full-precision copy of them."""
    workers: int
    device: str
    fragments: int
    tau_bounds: tuple[int, int]
    """The smallest and the largest τ that may be advised."""
    step_seconds: float
    """A step without any exchange, of the slowest worker."""
    ddp_step_seconds: float
    ddp_sent_bytes: int
    """By each worker in a step of DDP."""
    exchanges: list[Exchanges]
    """Full precision first, then from the most to the least exact."""


@dataclass(frozen=True)
class Option:
    """EASGD with exchanges in one form, at the τ that suits them."""

    compression: str | None
    free_tau: int
    """The smallest τ at which exchanges cost next to nothing."""
    tau: int
    """The same within the bounds of what may be advised."""
    exchange_seconds: float
    cost_seconds: float
    """By how much an exchange lengthens the steps that it hides behind."""
    step_seconds: float
    """Expected at ``tau``, exchanges included."""
    bytes_per_hour: int
    speed_up: float
    """Over DDP, expected."""
    pays: bool | None
    """Whether its free τ is below full precision's by more than the noise; None for the latter."""


@dataclass(frozen=True)
class Memory:
    """What a worker needs besides what training alone needs, in bytes."""

    between: int
    within: int
    """In the step of an exchange."""
    host: int = 0
    """Besides these, in host memory."""


class Advice:
    """What follows from what was measured.

    Args:
        measured: of all workers.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    @cached_property
    def options(self) -> list[Option]:
        """One of each form, full precision first."""
        return [self._option(exchanges) for exchanges in self.measured.exchanges]

    @cached_property
    def best(self) -> Option:
        """Of the options that pay, the smallest τ; of those that are much alike, the most exact.

        The codec that holds most of a difference back only helps where the others do not hide.
        """
        best, *others = self.options
        for option in others:
            needed = option.compression != _SPARSE or best.free_tau > self.measured.tau_bounds[1]
            if needed and option.pays and option.free_tau < (1 - _NOISE) * best.free_tau:
                best = option
        return best

    @property
    def take_ddp(self) -> bool:
        """Whether DDP is the better choice, see [Note: worth]."""
        return self.best.speed_up < WORTH

    @property
    def bandwidth_bits(self) -> float:
        """Bits per second that a worker sends, and receives, while an exchange is under way."""
        full = self.measured.exchanges[0]
        seconds = 1e-6 * full.durations.exchange
        return 8 * full.sent_bytes / self.measured.fragments / seconds

    @property
    def ddp_bytes_per_hour(self) -> int:
        """What a worker sends under DDP."""
        return round(3600 * self.measured.ddp_sent_bytes / self.measured.ddp_step_seconds)

    def memory(self, *, fragments: int | None = None, offload: bool = False) -> Memory:
        """What the best option needs: the center, the sum in flight, the pull, and the codec's.

        Args:
            fragments: instead of those that were measured.
            offload: with the center in host memory.
        """
        copy, part = self.measured.copy_bytes, 1 / (fragments or self.measured.fragments)
        whole, shared = _ACCOUNTS[self.best.compression]
        kept = 1 + part + whole + shared / self.measured.workers
        if offload:
            return Memory(between=0, within=round(part * copy), host=round(kept * copy))
        return Memory(between=round(kept * copy), within=round((kept + part) * copy))

    def as_dict(self) -> dict[str, Any]:
        """Numbers and conclusions, for a file."""
        return {
            "measured": asdict(self.measured),
            "bandwidth_bits_per_second": round(self.bandwidth_bits),
            "options": [asdict(option) for option in self.options],
            "ddp_bytes_per_hour": self.ddp_bytes_per_hour,
            "memory_bytes": asdict(self.memory()),
            "take_ddp": self.take_ddp,
            "tau": self.best.tau,
            "compression": self.best.compression,
            "speed_up_over_ddp": self.best.speed_up,
        }

    def _option(self, exchanges: Exchanges) -> Option:
        measured, durations = self.measured, exchanges.durations
        tau = period(durations, measured.fragments, measured.tau_bounds)
        apart = tau // measured.fragments
        exchange, cost = 1e-6 * durations.exchange, 1e-6 * durations.cost
        # Behind so many steps it hides, or they wait for it.
        step = max(measured.step_seconds + cost / apart, exchange / apart)
        return Option(
            compression=exchanges.compression,
            free_tau=period(durations, measured.fragments),
            tau=tau,
            exchange_seconds=exchange,
            cost_seconds=cost,
            step_seconds=step,
            bytes_per_hour=round(3600 * exchanges.sent_bytes / (tau * step)),
            speed_up=measured.ddp_step_seconds / step,
            pays=self._pays(exchanges),
        )

    def _pays(self, exchanges: Exchanges) -> bool | None:
        full, fragments = self.measured.exchanges[0], self.measured.fragments
        if exchanges is full:
            return None
        pairs = list(zip(exchanges.repetitions, full.repetitions, strict=True))
        smaller = sum(period(a, fragments) < period(b, fragments) for a, b in pairs)
        clearly = period(exchanges.durations, fragments) < (1 - _NOISE) * period(
            full.durations, fragments
        )
        return clearly and smaller >= _MOST * len(pairs)


def period(found: Durations, fragments: int, bounds: tuple[int, int] = (1, _NO_BOUND)) -> int:
    """The τ that ``tau="auto"`` would choose."""
    assert found.step
    assert found.exchange
    chosen: list[str] = []
    automatic = AutomaticPeriod(*bounds, fragments, log=chosen.append)
    while not chosen:  # it makes sure before it chooses
        automatic.observe([found])
    return automatic.after(0)[0]


def together(workers: Sequence[Durations]) -> Durations:
    """The slowest worker's step, the exchange as the last to begin it sees it, the mean cost."""
    return Durations(
        step=max(found.step for found in workers),
        exchange=min(found.exchange for found in workers),
        cost=round(statistics.fmean(found.cost for found in workers)),
    )
