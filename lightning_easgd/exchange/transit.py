"""What leaves this worker and what arrives: at most one exchange under way, with one owner.

[Note: who decides] Nothing that one worker knows alone decides whether a collective runs or how
large it is. What a worker wants to change (a new parameter joins, training stops) is announced in
the header of one exchange and takes effect at the next, when every worker has read every header.

[Note: delay] Under a rule with a delay a sum moves the center when it has arrived, but the worker
goes on from there at a step that is known when it is sent. Nothing reads the center in between but
who looks at it. So when it arrived, and whether it was awaited for a checkpoint, changes no bit of
what follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_easgd.algorithms import Rule, elastic
from lightning_easgd.center.center import Center
from lightning_easgd.center.fragments import Fragment
from lightning_easgd.communication import (
    AllReduce,
    ExchangeError,
    Header,
    Payload,
    PendingSum,
    Phase,
    verify,
)
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.consensus import Consensus
from lightning_easgd.exchange.contribution import Contribution, Pull, report_non_finite
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.timing import StepTimer
from lightning_easgd.schedules import Durations, Schedules
from lightning_easgd.telemetry import Telemetry

_CHECKSUM_EVERY = 16


@dataclass(frozen=True)
class InFlight:
    """An exchange that was started and not yet applied."""

    clock: int
    turn: int
    """Which fragment of each cohort it is of."""
    cohorts: int
    """Segments known when it was started, those that join after it included."""
    fragments: list[Fragment]
    payload: Payload
    pending: PendingSum
    last: bool = False
    """Whether no worker goes on after it."""
    moves: bool = True
    """Whether the rule moves the center; else what arrives is only added to it."""
    restarts: bool = False
    """Whether workers that were pulled go on from the center that it moves."""


class Transit:
    """Sends a worker's contribution and moves the center by the sum of all, when it has arrived.

    Args:
        center: of this worker's module.
        all_reduce: how sums travel between the workers.
        contribution: of this worker.
        rule: how sums move the center.
        telemetry: where costs are counted.
        agreement: what the rule wants to be agreed on.
        stops: what headers say of stopping.
        schedules: observe what the workers tell of themselves, after every exchange.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        contribution: Contribution,
        *,
        rule: Rule,
        telemetry: Telemetry,
        agreement: Agreement,
        stops: Stops,
        schedules: Schedules,
    ) -> None:
        self.all_reduce = all_reduce
        self.contribution = contribution
        self._agreement = agreement
        self._stops = stops
        self.timer = StepTimer()
        self.consensus = Consensus(center.turns)
        self.turn = 0
        """Which fragment the next exchange is of."""
        self.exchanged: tuple[int, int] | None = None
        """When the latest exchange began, and how many cohorts were in it."""
        self.owed: tuple[int, int, int] | None = None
        """When the worker goes on from the center, in which turn and how many cohorts."""
        self._center = center
        self._rule = rule
        self._telemetry = telemetry
        self._schedules = schedules
        self._in_flight: InFlight | None = None
        self._count = 0
        self.anybody_healthy = True
        """Whether a worker had finite weights at the latest exchange that has arrived."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return self._in_flight is None

    @property
    def restarts_workers(self) -> bool:
        """Whether workers that are pulled go on from the center that is under way."""
        return self._in_flight is not None and self._in_flight.restarts

    @property
    def reports(self) -> bool:
        """Whether this worker speaks for all."""
        return self.all_reduce.group.rank == 0

    def is_settled(self, clock: int) -> bool:
        """Whether workers restarted at ``clock`` with all parameters, and have nothing to add."""
        return self._rule.restarts and self.exchanged == (clock, self._center.joined)

    def start_training(self) -> None:
        """Begin as if there had been no exchange yet."""
        self.turn, self.exchanged = 0, None

    def arrived(self) -> bool:
        """Whether what is under way has arrived and only waits to be taken in."""
        return self._in_flight is not None and self._in_flight.pending.arrived()

    @torch.no_grad()
    def go_on(self, clock: float = math.inf) -> None:
        """Let the worker go on from the center, if it does by ``clock`` and still has to."""
        if self.owed is None or self.owed[0] > clock:
            return
        self.land()
        _, turn, joined = self.owed
        self.owed = None
        for fragment in self._center.fragments(turn, joined):
            fragment.restart(self._rule.mixing)

    def begin(self, clock: int, *, last: bool = False) -> Pull:
        """Send this worker's differences off; the caller owes the worker the returned pull."""
        self.go_on()
        self.contribution.take_differences(self.turn)
        pull, payload = self.contribution.give(clock, self.turn, last=last)
        restarts = self._agreement.restarts() and not last
        flight = self._start(clock, Phase.TRAINING, payload, last=last)
        self._in_flight = replace(flight, restarts=restarts)
        self._take_turns(clock)
        self.timer.exchange()
        return pull

    def stand_still(self, clock: int, phase: Phase, *, compare: bool = True) -> None:
        """Send a header without an exchange; :meth:`headers` has those of all.

        Args:
            clock: steps taken.
            phase: where this worker stands still.
            compare: whether the center here is that of the others now.
        """
        self.go_on()
        self.contribution.take_differences(self.turn)
        self._start(clock, phase, Payload(), compare=compare)

    def headers(self) -> list[Header]:
        """Of all, where this worker stands still; waits for them as long as it takes.

        If one of them began an exchange, :meth:`answer` it; else :meth:`land`.
        """
        assert self._in_flight is not None
        return self._await_headers(self._in_flight, patiently=True)

    def answer(self, clock: int) -> Pull:
        """Take part in the exchange that others began at ``clock``, whose headers are here."""
        assert self._in_flight is not None
        pull, payload = self.contribution.give(clock, self.turn)
        self._take_turns(clock)
        self.all_reduce.join(self._in_flight.pending, payload)
        self._count_bytes(*self.all_reduce.sum_bytes(payload))
        self._in_flight = replace(
            self._in_flight, clock=clock, payload=payload, restarts=self._agreement.restarts()
        )
        return pull

    def give_back(self, clock: int) -> None:
        """Let what is held back of the fragment whose turn it is go to the center."""
        held = self.all_reduce.holds_back
        payload = self.contribution.nothing(self.turn) if held else Payload()
        flight = self._start(clock, Phase.FIT_END, payload, last=True)
        self._in_flight = replace(flight, moves=False)
        self._take_turns(clock)

    def land(self) -> None:
        """Wait for what is under way, if anything, and move the center.

        Raises:
            ExchangeError: it failed, or the workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        flight = self._in_flight
        if flight is None:
            return
        headers = self._await_headers(flight)
        with self._waiting():
            flight.pending.wait()
        self.timer.arrive()
        self._in_flight = None
        self._apply(flight, headers)

    def _start(
        self,
        clock: int,
        phase: Phase,
        payload: Payload,
        *,
        last: bool = False,
        compare: bool = True,
    ) -> InFlight:
        header = self._header(clock, phase, compare)
        pending = self.all_reduce.start(payload, header, last=last)
        self._count_bytes(*self.all_reduce.header_bytes(header))
        self._count_bytes(*self.all_reduce.sum_bytes(payload, last=last))
        cohorts, fragments = len(self._center.cohorts), self.contribution.fragments
        self._in_flight = InFlight(
            clock, self.turn, cohorts, fragments, payload, pending, last=last
        )
        return self._in_flight

    def _header(self, clock: int, phase: Phase, compare: bool) -> Header:
        check = compare and (self._count % _CHECKSUM_EVERY == 0 or phase is Phase.FIT_END)
        self._count += 1
        measured = self.timer.durations()
        self._telemetry.step_seconds = 1e-6 * measured.step
        self._telemetry.exchange_seconds = 1e-6 * measured.exchange
        self._telemetry.exchange_cost_seconds = 1e-6 * measured.cost
        return Header(
            clock=clock,
            fingerprint=self._center.fingerprint(self._center.joined, self.turn),
            announced=self._center.fingerprint(len(self._center.cohorts)),
            phase=phase,
            stop=self._stops.requested,
            non_finite=not self.contribution.healthy,
            checksum=self._center.checksum() if check else 0,
            wait_microseconds=int(1e6 * self._telemetry.wait_seconds),
            named=self._observed(measured) | self._agreement.announce(),
        )

    def _observed(self, measured: Durations) -> dict[str, Any]:
        """What this worker tells schedules."""
        if not self._schedules.adaptive:
            return {}
        return self.consensus.announce(
            measured,
            self.contribution.distance,
            self.contribution.size,
            lr=self.contribution.learning_rate() if self._schedules.read_variance else None,
        )

    def _take_turns(self, clock: int) -> None:
        self.exchanged = clock, self._center.joined
        if self._rule.delay:
            self.owed = clock + self._rule.delay, self.turn, self._center.joined
        self.turn = (self.turn + 1) % self._center.turns

    def _count_bytes(self, moved: int, inside: int) -> None:
        self._telemetry.bytes_sent += moved
        self._telemetry.bytes_received += moved
        self._telemetry.bytes_inside += inside

    def _await_headers(self, flight: InFlight, *, patiently: bool = False) -> list[Header]:
        with self._waiting():
            headers = flight.pending.headers(patiently=patiently)
            # Before the sums: workers that do not meet may not have brought the same ones.
            verify(headers, self.all_reduce.ranks)
        return headers

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time; what fails meanwhile is not in flight any more."""
        began = time.perf_counter()
        try:
            yield
        except ExchangeError:
            self._in_flight = None
            raise
        waited = time.perf_counter() - began
        self._telemetry.wait_seconds += waited
        self.timer.wait(waited)

    @torch.no_grad()
    def _apply(self, flight: InFlight, headers: Sequence[Header]) -> None:
        self._stops.hear([header.stop for header in headers], self.all_reduce.ranks)
        self._agreement.hear([header.named for header in headers])
        self._telemetry.worker_wait_seconds = [1e-6 * h.wait_microseconds for h in headers]
        if flight.payload:
            healthy = [not header.non_finite for header in headers]
            senders = [healthy[rank] for rank in self.all_reduce.senders]
            self._telemetry.non_finite += senders.count(False)
            self._report_non_finite(flight.clock, healthy)
            if self.anybody_healthy:
                told = [headers[rank] for rank in self.all_reduce.senders]
                self._take_in(flight, healthy, senders, told)
        if flight.restarts:
            self._center.restart_worker()
        self._center.join(flight.cohorts)

    def _take_in(
        self,
        flight: InFlight,
        healthy: Sequence[bool],
        senders: Sequence[bool],
        told: Sequence[Header],
    ) -> None:
        mean = self._mean_distance(senders)
        self._move_center(flight, senders)
        if flight.payload.statistics:
            self._center.statistics.apply(healthy)
        # Only now: the center moves as all knew when the exchange began.
        if flight.moves and self._schedules.adaptive:
            seen = self.consensus.note(flight.turn, told, mean)
            if self._schedules.observe(seen):
                self.timer.restart()

    def _report_non_finite(self, clock: int, healthy: Sequence[bool]) -> None:
        self.anybody_healthy = any(healthy)
        ranks, group = self.all_reduce.ranks, self.all_reduce.group
        report_non_finite(
            clock,
            dict(zip(ranks, healthy, strict=True)),
            reports=group.rank == ranks[0],
            all_of_them=len(ranks) == group.size,
        )

    def _mean_distance(self, healthy: Sequence[bool]) -> float | None:
        if not self._schedules.read_variance:
            return None
        return self.contribution.mean_distance(sum(healthy))

    def _move_center(self, flight: InFlight, healthy: Sequence[bool]) -> None:
        rule = self._rule.at(flight.clock)
        self._telemetry.rates = {name: getattr(rule, name) for name in self._rule.schedules}
        for fragment in flight.fragments:
            center, total = fragment.center.parts, fragment.total.parts
            if rule.average and not all(healthy):
                elastic.scale_(total, [len(healthy) / sum(healthy)] * len(total))
            if flight.moves:
                for part, move, memory in zip(center, total, fragment.outer, strict=True):
                    rule.move_(part, move, memory)
                fragment.follow_center()
            else:
                elastic.move_center_(center, total)
            if rule.restarts and not (rule.delay or flight.last):
                fragment.restart(rule.mixing)
