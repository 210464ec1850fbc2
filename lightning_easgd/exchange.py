"""One exchange after another: due? -> start -> wait -> apply -> record.

[Note: order of a step] The paper's order (arXiv:1412.6651, Alg. 1 and 2): at optimizer step t with
τ | t the elastic difference d = α (x - c) is taken from the weights before the step, the local
optimizer steps, and only then the worker is pulled: x <- x - d. The pull never enters gradients,
momentum, weight decay or clipping. At t = 0 the difference is zero and no exchange is made.

[Note: who decides] Nothing that one worker knows alone decides whether a collective runs or how
large it is. What a worker wants to change (a new parameter joins, training stops) is announced in
the header of one exchange and takes effect at the next, when every worker has read every header.

[Note: standing still] Workers may have different numbers of batches. One that has no step to take
sends a header that says so, reads those of the others, and takes part in the exchange if one of
them began one: like a worker whose gradients are zero, it is pulled and pulls. Nothing is counted
twice, since what it gives to the center it loses itself. When all stand still they go on together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import elastic
from lightning_easgd.center import Center
from lightning_easgd.communication import (
    AllReduce,
    ExchangeError,
    Header,
    Payload,
    PendingSum,
    Place,
    Stop,
    verify,
    verify_places,
)
from lightning_easgd.contribution import Contribution, Pull, report_non_finite
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.pace import AutomaticPeriod, Durations, Pace
from lightning_easgd.rates import MovingRates
from lightning_easgd.schedules import Period, Strength
from lightning_easgd.segments import Fragment
from lightning_easgd.telemetry import Telemetry

ElasticPoint = Literal["iterate", "parameter"]

_CHECKSUM_EVERY = 16


@dataclass(frozen=True)
class Rules:
    """When to exchange, how strongly, and from which point of the worker."""

    period: Period | AutomaticPeriod
    strength: Strength
    overlap: bool = True
    elastic_point: ElasticPoint = "iterate"


@dataclass(frozen=True)
class InFlight:
    """An exchange that was started and not yet applied."""

    clock: int
    segments: int
    """Segments known when it was started, those that join after it included."""
    fragments: list[Fragment]
    payload: Payload
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
        self._automatic = rules.period if isinstance(rules.period, AutomaticPeriod) else None
        self._pace = Pace()
        self._in_flight: InFlight | None = None
        self._count = 0
        self._turn = 0
        self._finished = False
        self._last_header_left = False
        self._stop_requested = Stop.NO
        self._stop_agreed = Stop.NO
        group = all_reduce.group
        self._speaks = group.rank == 0
        rates = MovingRates(rules.strength, optimizers, workers=group.size, speaks=self._speaks)
        self._contribution = Contribution(
            center,
            optimizers,
            rates,
            telemetry=telemetry,
            round_=all_reduce.round_,
            from_iterate=rules.elastic_point == "iterate",
        )
        self.start_clock(0)

    def start_clock(self, step: int) -> None:
        """Begin to train after ``step`` optimizer steps, equal on all workers."""
        self._reopen()
        self._turn = 0
        self.clock = step
        self.telemetry.tau, self._next_due = self._rules.period.after(step)

    def request_stop(self, why: Stop) -> bool:
        """Ask all workers to stop at the same step. Signal-safe.

        They do within two periods; three if this worker stands still, whose header has left.

        Returns:
            False if no header will leave that could say so.
        """
        if self._last_header_left:
            return why is Stop.PREEMPTED  # there is nothing left to be saved and gone on with
        self._stop_requested = max(self._stop_requested, why)
        return True

    @property
    def stopped_together(self) -> bool:
        """Whether all workers end their training with this step, or have ended it."""
        return self.stopping.by_exception or self._finished

    @property
    def trains(self) -> bool:
        """Whether the module holds the worker, which may take another step."""
        return not (self._finished or self.center.lent)

    @contextmanager
    def step(self, optimizer: Optimizer) -> Iterator[None]:
        """Surrounds one step of one of the worker's optimizers; begins the exchange that is due.

        What was sent is also taken: the pull is applied even if the step raises.
        """
        assert not self.center.lent, "a step was taken while the module showed the center"
        self.center.adopt_unfrozen()
        pull: Pull = self._begin_due() if self.clock >= self._next_due else []
        try:
            yield
        finally:
            self._optimizers.after_step(optimizer)
            self._contribution.pull_worker(pull)
            self.clock += 1
            self.telemetry.steps += 1
            self._pace.step(self._arrived)

    def drain(self) -> None:
        """Wait for the exchange in flight, if any, and move the center.

        Raises:
            ExchangeError: it failed, or the workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        self._land()
        self._pace.interrupt()  # whoever needs the center has something to do with it

    def _land(self) -> None:
        flight = self._in_flight
        if flight is None:
            return
        headers = self._await_headers(flight)
        with self._waiting():
            flight.pending.wait()
        self._pace.arrive()
        self._in_flight = None
        self._apply(flight, headers)

    def meet(self, place: Place) -> bool:
        """Stand still until all workers do, answering the exchanges of those that still train.

        The clocks are then set to the latest. A worker at the end of its fit stays until all are,
        however long they train. Who leaves because all stop, leaves from here, and so together.

        Args:
            place: where this worker stands still; not in training.

        Returns:
            False if all stop; :attr:`stopping` says why.

        Raises:
            ExchangeError: as for :meth:`drain`.
        """
        while True:
            self.drain()
            self.stopping = self._stop_agreed
            self.center.adopt_unfrozen()
            self._contribution.take_differences(self._turn)
            flight = self._start(place, Payload())
            headers = self._await_headers(flight, patiently=True)
            training = [header.clock for header in headers if header.place is Place.TRAINING]
            if training:
                self._answer(flight, training[0])
                continue
            self.drain()
            self.clock = max(header.clock for header in headers)
            if self.stopping.by_exception:
                return False
            verify_places(headers)
            if place is not Place.FIT_END or all(h.place is place for h in headers):
                return True

    def show_center(self) -> None:
        """Put the center into the module until ``center.show_worker``."""
        self.drain()
        self.center.show()

    def finish(self, *, exchange: bool) -> bool:
        """End training: a last exchange if wanted, then the module holds the center everywhere.

        Waits for all workers. Parameters that wait to join are let in first, so that nothing of
        theirs is lost. Does nothing a second time.

        Returns:
            False if all stop before; :attr:`stopping` says why.
        """
        if self._finished:
            return True
        if not self.meet(Place.FIT_END):
            return False
        self._last_header_left = True
        for _ in range(self.center.turns):
            if exchange:
                self._begin(last=True)
            else:
                self._give_back()
            self.drain()
        self._finished = True
        self.stopping = self._stop_agreed
        self.center.overwrite_worker()
        return True

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
            "turn": self._turn,
            "period": {} if self._automatic is None else self._automatic.state(),
            **self.center.shared_state(),
        }

    def own_state(self, module: nn.Module) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {
            "weights": self.center.worker_state_dict(module),
            "look_ahead": self._optimizers.look_ahead_state(),
            "telemetry": self.telemetry.counters(),
            "held_back": self._all_reduce.state(),
        }

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; the module holds the center.

        Args:
            shared: of :meth:`shared_state`.
            own: of :meth:`own_state`, whose weights the caller loads; None to start at the center.
        """
        self.center.load_shared_state(shared)
        self.clock = shared["clock"]
        self._turn = shared["turn"] % self.center.turns
        if self._rules.period.is_constant:
            # Perhaps another one now. An exchange that is due at the clock was not begun yet.
            self.telemetry.tau, self._next_due = self._rules.period.after(max(0, self.clock - 1))
        else:
            self.telemetry.tau, self._next_due = shared["tau"], shared["next_due"]
            if self._automatic is not None and shared["period"]:
                self._automatic.load_state(shared["period"])
        if own is not None:
            self._optimizers.load_look_ahead_state(own["look_ahead"])
            self.telemetry.load_counters(own["telemetry"])
            self._all_reduce.load_state(own.get("held_back", {}))

    def read_module(self) -> None:
        """Start again from the module's weights, which are equal on all workers."""
        self.drain()
        self.center.read_module()
        self._reopen()

    def _reopen(self) -> None:
        # The learning-rate finder ends a training of its own before the one that it was called in.
        self._finished = self._last_header_left = False

    def _begin_due(self) -> Pull:
        # Stops at an exchange, not when a header is read: that is not the same step on all workers.
        self._land()
        self.stopping = self._stop_agreed
        self.telemetry.tau, self._next_due = self._rules.period.after(self.clock)
        return self._begin()

    def _begin(self, *, last: bool = False) -> Pull:
        """Send this worker's differences off; the caller owes the worker the returned pull."""
        self._contribution.take_differences(self._turn)
        pull, payload = self._contribution.give(self.clock, self._turn, last=last)
        self._start(Place.TRAINING, payload, last=last)
        self._take_turns()
        self._pace.exchange()
        if not self._rules.overlap:
            self._land()
        return pull

    def _give_back(self) -> None:
        """Let what is held back of the fragment whose turn it is go to the center."""
        held = self._all_reduce.holds_back
        payload = self._contribution.nothing(self._turn) if held else Payload()
        self._start(Place.FIT_END, payload, last=True)
        self._take_turns()

    def _take_turns(self) -> None:
        self._turn = (self._turn + 1) % self.center.turns

    def _answer(self, flight: InFlight, clock: int) -> None:
        """Take part in the exchange that others began at ``clock``, whose headers are here."""
        self.clock = clock
        self.telemetry.tau, self._next_due = self._rules.period.after(clock)
        pull, payload = self._contribution.give(self.clock, self._turn)
        self._take_turns()
        self._all_reduce.join(flight.pending, payload)
        self._count_bytes(self._all_reduce.sum_bytes(payload))
        self._in_flight = replace(flight, clock=clock, payload=payload)
        self._contribution.pull_worker(pull)

    def _start(self, place: Place, payload: Payload, *, last: bool = False) -> InFlight:
        segments = len(self.center.segments)
        check = self._count % _CHECKSUM_EVERY == 0 or place is Place.FIT_END
        self._count += 1
        measured = self._pace.durations()
        self.telemetry.step_seconds = 1e-6 * measured.step
        self.telemetry.exchange_seconds = 1e-6 * measured.exchange
        self.telemetry.exchange_cost_seconds = 1e-6 * measured.cost
        header = Header(
            clock=self.clock,
            fingerprint=self.center.fingerprint(self.center.joined, self._turn),
            announced=self.center.fingerprint(segments),
            place=place,
            stop=self._stop_requested,
            non_finite=not self._contribution.healthy,
            checksum=self.center.checksum() if check else 0,
            wait_microseconds=int(1e6 * self.telemetry.wait_seconds),
            step_microseconds=measured.step,
            exchange_microseconds=measured.exchange,
            cost_microseconds=measured.cost,
        )
        pending = self._all_reduce.start(payload, header, last=last)
        moved = self._all_reduce.sum_bytes(payload, last=last)
        self._count_bytes(self._all_reduce.header_bytes + moved)
        fragments = self._contribution.fragments
        self._in_flight = InFlight(self.clock, segments, fragments, payload, pending)
        return self._in_flight

    def _count_bytes(self, moved: int) -> None:
        self.telemetry.bytes_sent += moved
        self.telemetry.bytes_received += moved

    def _await_headers(self, flight: InFlight, *, patiently: bool = False) -> list[Header]:
        with self._waiting():
            headers = flight.pending.headers(patiently=patiently)
            # Before the sums: workers that do not meet may not have brought the same ones.
            verify(headers)
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
        self.telemetry.wait_seconds += waited
        self._pace.wait(waited)

    @torch.no_grad()
    def _apply(self, flight: InFlight, headers: Sequence[Header]) -> None:
        self._stop_agreed = max(self._stop_agreed, *(header.stop for header in headers))
        self.telemetry.worker_wait_seconds = [1e-6 * h.wait_microseconds for h in headers]
        if flight.payload:
            healthy = [not header.non_finite for header in headers]
            self.telemetry.non_finite += healthy.count(False)
            report_non_finite(flight.clock, healthy, speaks=self._speaks)
            for fragment in flight.fragments:
                elastic.move_center_(fragment.center.parts, fragment.total.parts)
            if flight.payload.statistics:
                self.center.statistics.apply(healthy)
            workers = [_durations(header) for header in headers]
            if self._automatic is not None and self._automatic.observe(workers):
                self._pace.restart()
        self.center.join(flight.segments)

    def _arrived(self) -> bool:
        return self._in_flight is not None and self._in_flight.pending.arrived()


def _durations(header: Header) -> Durations:
    return Durations(
        header.step_microseconds, header.exchange_microseconds, header.cost_microseconds
    )
