"""One exchange after another: due? -> start -> wait -> apply -> record.

[Note: order of a step] The paper's order (arXiv:1412.6651, Alg. 1 and 2): at optimizer step t with
τ | t the elastic difference d = α (x - c) is taken from the weights before the step, the local
optimizer steps, and only then the worker is pulled: x <- x - d. The pull never enters gradients,
momentum, weight decay or clipping. At t = 0 the difference is zero and no exchange is made.

[Note: who decides] Nothing that one worker knows alone decides whether a collective runs or how
large it is. What a worker wants to change (a new parameter joins, training stops) is announced in
the header of one exchange and takes effect at the next, when every worker has read every header.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import elastic
from lightning_easgd.center import Center
from lightning_easgd.communication import AllReduce, ExchangeError, Header, PendingSum, Stop, verify
from lightning_easgd.flat import FlatVector
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.rates import MovingRates
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.telemetry import Telemetry

ElasticPoint = Literal["iterate", "parameter"]

_CHECKSUM_EVERY = 16


class NonFiniteError(RuntimeError):
    """The weights of every worker became non-finite; the center holds the last finite values."""


@dataclass(frozen=True)
class Rules:
    """When to exchange, how strongly, and from which point of the worker."""

    period: Period
    strength: Strength
    overlap: bool = True
    elastic_point: ElasticPoint = "iterate"


@dataclass(frozen=True)
class InFlight:
    """An exchange that was started and not yet applied."""

    clock: int
    segments: int
    """Segments known when it was started, those that join after it included."""
    carries_sums: bool
    pending: PendingSum


class Exchange:
    """The elastic link between one worker and the center it shares with the others.

    Args:
        center: the center of this worker's module.
        all_reduce: how sums travel between the workers.
        optimizers: the worker's own optimizers.
        rules: period, strength and variants.
        telemetry: where costs are counted.

    Raises:
        ValueError: the strength is unstable for this number of workers.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        *,
        optimizers: LocalOptimizers,
        rules: Rules,
        telemetry: Telemetry,
    ) -> None:
        self.center = center
        self.telemetry = telemetry
        self.stopping = Stop.NO
        """Why training ends with this step, on every worker."""
        self._all_reduce = all_reduce
        self._optimizers = optimizers
        self._rules = rules
        self._in_flight: InFlight | None = None
        self._count = 0
        self._finished = False
        self._stop_requested = Stop.NO
        self.stop_agreed = Stop.NO
        group = all_reduce.group
        self._speaks = group.rank == 0
        self._rates = MovingRates(
            rules.strength, optimizers, workers=group.size, speaks=self._speaks
        )
        self.start_clock(0)

    def start_clock(self, step: int) -> None:
        """Set the number of optimizer steps taken so far, equal on all workers."""
        self.clock = step
        self.telemetry.tau, self._next_due = self._rules.period.after(step)

    def request_stop(self, why: Stop) -> bool:
        """Ask all workers to stop at the same step, within two periods. Signal-safe.

        Returns:
            False if no header will leave that could say so.
        """
        self._stop_requested = max(self._stop_requested, why)
        return not self._finished

    @property
    def stopped_together(self) -> bool:
        """Whether all workers end their training with this step, or have ended it."""
        return bool(self.stopping) or self._finished

    @contextmanager
    def step(self, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds one step of one of the worker's optimizers; begins the exchange that is due.

        What was sent is also taken: the pull is applied even if the step raises.
        """
        assert not self.center.lent, "a step was taken while the module showed the center"
        self.center.adopt_unfrozen()
        pull = self._begin_due() if self.clock >= self._next_due else []
        try:
            yield
        finally:
            self._optimizers.after_step(optimizer)
            for segment, vector in zip(self.center.segments, pull, strict=False):
                vector.subtract_from(segment.parameters)
            self.clock += 1
            self.telemetry.steps += 1

    def drain(self) -> None:
        """Wait for the exchange in flight, if any, and move the center.

        Raises:
            ExchangeError: it failed, or the workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        flight = self._in_flight
        if flight is None:
            return
        began = time.perf_counter()
        try:
            headers = flight.pending.headers()
            # Before the sums: workers that do not meet may not have brought the same ones.
            verify(headers)
            flight.pending.wait()
        except ExchangeError:
            self._in_flight = None
            raise
        self._in_flight = None
        self.telemetry.wait_seconds += time.perf_counter() - began
        self._apply(flight, headers)

    def show_center(self) -> None:
        """Put the center into the module until ``center.show_worker``."""
        self.drain()
        self.center.show()

    def finish(self, *, exchange: bool) -> None:
        """End training: a last exchange if wanted, then the module holds the center everywhere.

        Parameters that wait to join are let in first, so that nothing of theirs is lost. Does
        nothing a second time.
        """
        if self._finished:
            return
        self.drain()
        # Headers alone first: who waits is let in by all workers, and what ranks disagree in shows.
        self._start(healthy=True, done=True, payload=[])
        self.drain()
        if exchange:
            self._begin(done=True)
            self.drain()
        self._finished = True
        self.center.overwrite_worker()

    def center_state_dict(self, module: nn.Module, *, latest: bool = True) -> dict[str, Any]:
        """The module's state dict with the center's weights; a copy, so it stays as it is.

        Args:
            module: the worker's.
            latest: whether the exchange in flight is awaited first.
        """
        if latest:
            self.drain()
        return self.center.state_dict(module)

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint. Nothing may be in flight."""
        assert self._in_flight is None
        return {
            "clock": self.clock,
            "tau": self.telemetry.tau,
            "next_due": self._next_due,
            **self.center.shared_state(),
        }

    def own_state(self, module: nn.Module) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {
            "weights": self.center.worker_state_dict(module),
            "look_ahead": self._optimizers.look_ahead_state(),
            "telemetry": self.telemetry.counters(),
        }

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; the module holds the center.

        Args:
            shared: of :meth:`shared_state`.
            own: of :meth:`own_state`, whose weights the caller loads; None to start at the center.
        """
        self.center.load_shared_state(shared)
        self.clock = shared["clock"]
        if self._rules.period.is_constant:
            # Perhaps another one now. An exchange that is due at the clock was not begun yet.
            self.telemetry.tau, self._next_due = self._rules.period.after(max(0, self.clock - 1))
        else:
            self.telemetry.tau, self._next_due = shared["tau"], shared["next_due"]
        if own is not None:
            self._optimizers.load_look_ahead_state(own["look_ahead"])
            self.telemetry.load_counters(own["telemetry"])

    def read_module(self) -> None:
        """Start again from the module's weights, which are equal on all workers."""
        self.drain()
        self.center.read_module()
        self._finished = False

    def _begin_due(self) -> list[FlatVector]:
        # Stops at an exchange, not when a header is read: that is not the same step on all workers.
        self.drain()
        self.stopping = self.stop_agreed
        self.telemetry.tau, self._next_due = self._rules.period.after(self.clock)
        return self._begin(done=False)

    @torch.no_grad()
    def _begin(self, *, done: bool) -> list[FlatVector]:
        """Send this worker's differences off; the caller owes the worker the returned pull."""
        segments = self.center.elastic()
        for segment in segments:
            segment.total.read_(segment.parameters)
        if self._rules.elastic_point == "iterate":
            self._optimizers.undo_look_ahead_(
                {
                    id(parameter): view
                    for segment in segments
                    for parameter, view in zip(segment.parameters, segment.total.views, strict=True)
                }
            )
        for segment in segments:
            elastic.difference_(segment.total.parts, segment.center.parts)
        healthy = self._measure()
        pull = self._scale() if healthy else self._restart_worker()
        payload = [part for segment in segments for part in segment.total.parts]
        payload += self.center.statistics.contribute(healthy)
        if not healthy:
            self.center.overwrite_worker()
        self.telemetry.exchanges += 1
        self._start(healthy=healthy, done=done, payload=payload)
        if not self._rules.overlap:
            self.drain()
        return pull

    def _start(self, *, healthy: bool, done: bool, payload: list[torch.Tensor]) -> None:
        segments = len(self.center.segments)
        check = done or self._count % _CHECKSUM_EVERY == 0
        self._count += 1
        header = Header(
            clock=self.clock,
            fingerprint=self.center.fingerprint(self.center.joined),
            announced=self.center.fingerprint(segments),
            done=done,
            stop=self._stop_requested,
            non_finite=not healthy,
            checksum=self.center.checksum() if check else 0,
            wait_microseconds=int(1e6 * self.telemetry.wait_seconds),
        )
        pending = self._all_reduce.start(payload, header)
        self._in_flight = InFlight(self.clock, segments, bool(payload), pending)
        moved = self._all_reduce.traffic_bytes(sum(part.nbytes for part in payload))
        self.telemetry.bytes_sent += moved
        self.telemetry.bytes_received += moved

    @torch.no_grad()
    def _apply(self, flight: InFlight, headers: Sequence[Header]) -> None:
        self.stop_agreed = max(self.stop_agreed, *(header.stop for header in headers))
        self.telemetry.worker_wait_seconds = [1e-6 * h.wait_microseconds for h in headers]
        healthy = [not header.non_finite for header in headers]
        self._report_non_finite(flight.clock, healthy)
        if flight.carries_sums:
            for segment in self.center.elastic():
                elastic.move_center_(segment.center.parts, segment.total.parts)
            self.center.statistics.apply(healthy)
        self.center.join(flight.segments)

    def _measure(self) -> bool:
        """Record the consensus distance; whether the differences are finite."""
        segments = self.center.elastic()
        distance = math.hypot(*(segment.total.norm() for segment in segments))
        size = math.hypot(*(segment.center.norm() for segment in segments))
        self.telemetry.consensus_distance = distance / max(size, 1e-30)
        return math.isfinite(distance) or all(s.total.is_finite() for s in segments)

    def _scale(self) -> list[FlatVector]:
        """Turn x - c into α (x - c); a copy of it is the worker's own pull."""
        segments = self.center.elastic()
        alphas, default = self._rates.at(self.clock)
        self.telemetry.alpha = max([*alphas.values(), default])
        for segment in segments:
            rates = [alphas.get(id(parameter), default) for parameter in segment.parameters]
            elastic.scale_(segment.total.views, rates)
        return [segment.total.clone() for segment in segments]

    def _restart_worker(self) -> list[FlatVector]:
        """Leave a worker with non-finite weights out of the sum and forget what made it so."""
        for segment in self.center.elastic():
            segment.total.zero_()
            self._optimizers.forget(segment.parameters)
        return []

    def _report_non_finite(self, clock: int, healthy: Sequence[bool]) -> None:
        sick = [rank for rank, well in enumerate(healthy) if not well]
        self.telemetry.non_finite += len(sick)
        if len(sick) == len(healthy):
            raise NonFiniteError(
                f"At step {clock} the weights of every worker were NaN or infinite. Training stops;"
                " the center holds the last finite weights. Lower the learning rate, clip gradients"
                " or check the data."
            )
        if sick and self._speaks:
            warnings.warn(
                f"At step {clock} the weights of worker(s) {sick} were NaN or infinite. Their"
                " differences were left out of the exchange, and they restarted from the center"
                " with fresh optimizer state.",
                stacklevel=2,
            )
