"""From what was measured to what to take: numbers in, numbers and a verdict out.

[Note: worth] At equal samples elastic averaging is behind DDP (docs/measured.md), so it must be
faster by more than what measuring can tell apart before it is advised.

[Note: noise] What an exchange costs is the difference of two sums of steps, so it is off by about
the spread of a step times the root of how many there are in a round. As an exchange may take 2 % of
the time only, that weighs fifty times in τ: a cost is counted as far as it is above its noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lightning_easgd.schedules import Durations
from lightning_easgd.schedules.automatic import smallest_period

WORTH = 1.05
"""The least speed-up over DDP for which another algorithm is advised."""

_NOISE, _MOST = 0.1, 0.75
_NO_BOUND = 10**9
_SPARSE = "topk"
_ACCOUNTS = {None: (0, 0), "bf16": (0, 1), "fp16": (0, 1), "int8": (1, 1), "topk": (1, 0)}
"""fp32 copies that a codec keeps, whole ones and shared ones: see docs/how/compression.md."""


@dataclass(frozen=True)
class Trial:
    """Exchanges in one form, one after another; of fragments, if the model travels in such."""

    durations: Durations
    """As all workers together see it: see :func:`together`."""
    round_steps: int
    """From one exchange to the next."""
    sent_bytes: int
    """By each worker, to exchange the whole model."""


@dataclass(frozen=True)
class Exchanges:
    """Exchanges in one form."""

    compression: str | None
    trials: list[Trial]


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
    spread_seconds: float
    """The standard deviation of such steps."""
    ddp_step_seconds: float
    ddp_sent_bytes: int
    """By each worker in a step of DDP."""
    exchanges: list[Exchanges]
    """Full precision first, then from the most to the least exact."""
    sizes: Sequence[int] = ()
    """Elements of each parameter that is trained."""
    often_tau: int = 2
    """The period of small parameters, if they are exchanged more often than the others."""
    pause: int = 1
    """Of which τ / fragments has to be a multiple."""


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
    cost_noise_seconds: float
    """How far that may be off; what is not above it is not counted."""
    step_seconds: float
    """Expected at ``tau``, exchanges included."""
    bytes_per_hour: int
    speed_up: float
    """Over DDP, expected."""
    saves: int
    """By more than the noise: 1, a smaller free τ than full precision's; -1, a larger one; else 0.
    """


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
            if needed and option.saves > 0 and option.free_tau < (1 - _NOISE) * best.free_tau:
                best = option
        return best

    @property
    def take_ddp(self) -> bool:
        """Whether DDP is the better choice, see [Note: worth]."""
        return self.best.speed_up < WORTH

    @property
    def bandwidth_bits(self) -> float:
        """Bits per second that a worker sends, and receives, while an exchange is under way."""
        sent_bytes = self.measured.exchanges[0].trials[0].sent_bytes
        return 8 * sent_bytes / self.measured.fragments / self.options[0].exchange_seconds

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
        measured, trials = self.measured, exchanges.trials
        found = self._counted(trials)
        tau = smallest_period(found, measured.fragments, measured.tau_bounds, often=measured.pause)
        apart = tau // measured.fragments
        exchange, cost = 1e-6 * found.exchange, 1e-6 * found.cost
        step = hidden_step(measured.step_seconds + cost / apart, exchange / apart)
        return Option(
            compression=exchanges.compression,
            free_tau=self._free_tau(trials),
            tau=tau,
            exchange_seconds=exchange,
            cost_seconds=1e-6 * statistics.median(trial.durations.cost for trial in trials),
            cost_noise_seconds=self._noise(trials),
            step_seconds=step,
            bytes_per_hour=round(3600 * trials[0].sent_bytes / (tau * step)),
            speed_up=measured.ddp_step_seconds / step,
            saves=self._saves(exchanges),
        )

    def _counted(self, trials: Sequence[Trial]) -> Durations:
        """The medians, but the cost only as far as it is above its noise: see [Note: noise]."""
        cost = statistics.median(trial.durations.cost for trial in trials)
        return Durations(
            step=round(1e6 * self.measured.step_seconds),
            exchange=round(statistics.median(trial.durations.exchange for trial in trials)),
            cost=max(0, round(cost - 1e6 * self._noise(trials))),
        )

    def _noise(self, trials: Sequence[Trial]) -> float:
        steps = statistics.fmean(trial.round_steps for trial in trials)
        return self.measured.spread_seconds * math.sqrt(steps / len(trials))

    def _saves(self, exchanges: Exchanges) -> int:
        trials = [exchanges.trials, self.measured.exchanges[0].trials]
        ours, full = (self._free_tau(several) for several in trials)
        pairs = [[self._free_tau([one]) for one in pair] for pair in zip(*trials, strict=True)]
        if ours < (1 - _NOISE) * full and sum(a < b for a, b in pairs) >= _MOST * len(pairs):
            return 1
        if full < (1 - _NOISE) * ours and sum(a > b for a, b in pairs) >= _MOST * len(pairs):
            return -1
        return 0

    def _free_tau(self, trials: Sequence[Trial]) -> int:
        fragments = self.measured.fragments
        return smallest_period(self._counted(trials), fragments, (1, _NO_BOUND))


def hidden_step(compute: float, exchange: float) -> float:
    """Seconds of a step behind which an exchange hides, or which waits for it.

    Args:
        compute: seconds of a step alone.
        exchange: seconds of an exchange, for each of the steps that it may hide behind.
    """
    return max(compute, exchange)


def together(workers: Sequence[Durations]) -> Durations:
    """The slowest worker's step, the exchange as the last to begin it sees it, the mean cost."""
    return Durations(
        step=max(found.step for found in workers),
        exchange=min(found.exchange for found in workers),
        cost=round(statistics.fmean(found.cost for found in workers)),
    )
