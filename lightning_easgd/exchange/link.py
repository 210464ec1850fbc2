"""How a participant's difference reaches a center; see :class:`CollectiveLink`.

[Note: who decides] Nothing that one worker knows alone decides whether a collective runs or how
large it is. What a worker wants to change (a new parameter joins, training stops) is announced in
the header of one exchange and takes effect at the next, when every worker has read every header.

[Note: delay] Under a rule with a delay a sum moves the center when it has arrived, but the worker
goes on from there at a step that is known when it is sent. In between, only evaluation and
checkpoints read the center, never training. So no bit of what follows depends on when the sum
arrived, or on whether a checkpoint waited for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch

from lightning_easgd.communication import (
    ExchangeError,
    Header,
    Payload,
    PendingSum,
    Phase,
    verify,
)
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.arrival import Arrivals
from lightning_easgd.exchange.consensus import Consensus
from lightning_easgd.exchange.difference import Contribution, Difference, Participant, Pull
from lightning_easgd.exchange.states import Exchanged, Free, HeaderSent, InFlight, Owed
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.timing import StepTimer
from lightning_easgd.schedules import Durations, Schedules

_CHECKSUM_EVERY = 16


class CollectiveLink:
    """Sends a worker's difference and moves the center by the sum of all, when it has arrived.

    At most one exchange is under way.

    Args:
        participant: takes the differences.
        agreement: what rule and schedules want to be agreed on; None: nothing.
        stops: what headers say of stopping; None: nobody stops.
        schedules: observe what the workers tell of themselves, after every exchange; None: none do.
    """

    def __init__(
        self,
        participant: Participant,
        *,
        agreement: Agreement | None = None,
        stops: Stops | None = None,
        schedules: Schedules | None = None,
    ) -> None:
        self.participant = participant
        self.all_reduce = participant.all_reduce
        self.timer = StepTimer()
        self.consensus = Consensus(participant.portion.fragment_count)
        self._portion = participant.portion
        self._rule = participant.rule
        self._telemetry = participant.telemetry
        self._agreement = agreement or Agreement(())
        self._stops = stops or Stops()
        self._schedules = schedules or Schedules({})
        self.arrivals = Arrivals(participant, schedules=self._schedules, consensus=self.consensus)
        self._headers_sent = 0
        self._waits: list[float] = []
        self._state: Free | HeaderSent | InFlight = Free()
        self.start_training()

    def start_training(self) -> None:
        """Begin as if there had been no exchange yet."""
        self._index = 0  # of the fragments in the next exchange
        self._exchanged: Exchanged | None = None
        self.forget_owed()

    def forget_owed(self) -> None:
        """Let the worker go on from where it is."""
        self.owed: Owed | None = None

    def begin(self, *, goes_on: bool) -> bool:
        """Training begins; as of Link."""
        return True

    def refresh(self) -> None:
        """The center here is the newest that there is."""

    @property
    def resets_workers(self) -> bool:
        """Whether workers that are pulled restart at the center that is under way."""
        return isinstance(self._state, InFlight) and self._state.resets

    def is_settled(self, clock: int) -> bool:
        """Whether workers restarted at ``clock`` with all parameters, and have nothing to add."""
        return self._rule.resets_to_center and self._exchanged == Exchanged(
            clock, self._portion.joined
        )

    def arrived(self) -> bool:
        """Whether what is under way has arrived and only waits to be taken in."""
        return not isinstance(self._state, Free) and self._state.pending.arrived()

    @torch.no_grad()
    def go_on(self, clock: float = math.inf) -> None:
        """Let the worker go on from the center, if it has to by ``clock`` and did not yet."""
        if self.owed is None or self.owed.due > clock:
            return
        self.wait()
        owed, self.owed = self.owed, None
        for fragment in self._portion.fragments(owed.index, owed.joined):
            fragment.reset_to_center(self._rule.mixing_rate)

    def start(self, clock: int, *, last: bool = False) -> Pull:
        """Send this worker's difference off.

        Args:
            clock: steps taken.
            last: whether no worker goes on after it.

        Returns:
            The pull, by which the caller moves the participant.
        """
        self.go_on()
        difference = self.participant.take_difference(self._index)
        given = self.participant.contribute(difference, clock=clock, index=self._index, last=last)
        resets = self._agreement.resets_to_center() and not last
        self._send(clock, difference, given, last=last, resets=resets)
        self.timer.exchange()
        return given.pull

    def announce_idle(self, clock: int, phase: Phase, *, compare: bool = True) -> None:
        """Send a header without an exchange; :meth:`headers` has those of all workers.

        Args:
            clock: steps taken.
            phase: where this worker is idle.
            compare: whether the center here is that of the others now.
        """
        self.go_on()
        difference = self.participant.take_difference(self._index)
        self._send_header(clock, difference, phase=phase, compare=compare)

    def headers(self) -> list[Header]:
        """Headers of all workers, where this one is idle; waits for them as long as it takes.

        If one of them began an exchange, :meth:`shadow` it; else :meth:`wait`.
        """
        assert isinstance(self._state, HeaderSent)
        return self._await_headers(self._state.pending, patiently=True)

    def shadow(self, clock: int, *, anew: bool = False) -> Pull:
        """Take part, while idle, in the exchange that others began; all headers are here.

        Args:
            clock: of the exchange.
            anew: whether the difference is another one than when the header left.

        Returns:
            The pull, by which the caller moves the participant.
        """
        sent, index = self._state, self._index
        assert isinstance(sent, HeaderSent)
        difference = self.participant.take_difference(index) if anew else sent.difference
        given = self.participant.contribute(difference, clock=clock, index=index)
        self._advance(clock)
        self.all_reduce.join(sent.pending, given.payload)
        self._telemetry.count_bytes(*self.all_reduce.sum_bytes(given.payload))
        resets = self._agreement.resets_to_center()
        self._state = InFlight(
            sent.pending, sent.cohorts, difference, given, clock, index, resets=resets
        )
        return given.pull

    def flush_residual(self, clock: int) -> None:
        """Let the residual of the fragment at this index go to the center."""
        if self.all_reduce.has_residual:
            difference = self.participant.nothing(self._index)
            given = Contribution(Payload(difference.totals))
            self._send(clock, difference, given, phase=Phase.FIT_END, last=True, moves=False)
        else:
            self._send_header(clock, Difference([]), phase=Phase.FIT_END)
            self._advance(clock)

    def wait(self) -> None:
        """Wait for what is under way, if anything, and move the center.

        Raises:
            ExchangeError: it failed, or the workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        state = self._state
        if isinstance(state, Free):
            return
        headers = self._await_headers(state.pending)
        with self._waiting():
            state.pending.wait()
        self.timer.arrive()
        self._state = Free()
        self._apply(state, headers)

    def state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint. Nothing may be under way."""
        assert isinstance(self._state, Free)
        return {
            "fragment_index": self._index,
            "exchanged": None if self._exchanged is None else astuple(self._exchanged),
            "owed": None if self.owed is None else astuple(self.owed),
            "consensus": self.consensus.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, perhaps with another number of fragments."""
        self._index = state["fragment_index"] % self._portion.fragment_count
        exchanged, owed = state["exchanged"], state["owed"]
        self._exchanged = None if exchanged is None else Exchanged(*exchanged)
        if self._rule.delay and owed:
            due, index, joined = owed
            self.owed = Owed(due, index % self._portion.fragment_count, joined)
        self.consensus.load_state(state["consensus"])

    def _send(
        self,
        clock: int,
        difference: Difference,
        given: Contribution,
        *,
        phase: Phase = Phase.TRAINING,
        last: bool,
        moves: bool = True,
        resets: bool = False,
    ) -> None:
        header = self._header(clock, difference, phase=phase)
        pending = self.all_reduce.start(given.payload, header, last=last)
        self._telemetry.count_bytes(*self.all_reduce.header_bytes(header))
        self._telemetry.count_bytes(*self.all_reduce.sum_bytes(given.payload, last=last))
        self._state = InFlight(
            pending,
            len(self._portion.cohorts),
            difference,
            given,
            clock,
            self._index,
            last=last,
            moves=moves,
            resets=resets,
        )
        self._advance(clock)

    def _send_header(
        self, clock: int, difference: Difference, *, phase: Phase, compare: bool = True
    ) -> None:
        header = self._header(clock, difference, phase=phase, compare=compare)
        pending = self.all_reduce.start(Payload(), header)
        self._telemetry.count_bytes(*self.all_reduce.header_bytes(header))
        self._state = HeaderSent(pending, len(self._portion.cohorts), difference)

    def _header(
        self, clock: int, difference: Difference, *, phase: Phase, compare: bool = True
    ) -> Header:
        due = self._headers_sent % _CHECKSUM_EVERY == 0 or phase is Phase.FIT_END
        self._headers_sent += 1
        measured = self.timer.report(self._telemetry)
        return Header(
            clock=clock,
            fingerprint=self._portion.fingerprint(self._portion.joined, self._index),
            announced=self._portion.fingerprint(len(self._portion.cohorts)),
            phase=phase,
            stop=self._stops.requested,
            non_finite=not difference.healthy,
            checksum=self._portion.checksum() if compare and due else 0,
            wait_microseconds=int(1e6 * self._telemetry.wait_seconds),
            named=self._observed(difference, measured) | self._agreement.announce(),
        )

    def _observed(self, difference: Difference, measured: Durations) -> dict[str, Any]:
        """What this worker tells schedules."""
        if not self._schedules.adaptive:
            return {}
        reads = self._schedules.read_variance
        lr = self.participant.learning_rate() if reads else None
        return self.consensus.announce(measured, difference.distance, difference.size, lr=lr)

    def _advance(self, clock: int) -> None:
        joined = self._portion.joined
        self._exchanged = Exchanged(clock, joined)
        if self._rule.delay:
            self.owed = Owed(clock + self._rule.delay, self._index, joined)
        self._index = (self._index + 1) % self._portion.fragment_count

    def _await_headers(self, pending: PendingSum, *, patiently: bool = False) -> list[Header]:
        with self._waiting():
            headers = pending.headers(patiently=patiently)
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
            self._state = Free()
            raise
        waited = time.perf_counter() - began
        self._telemetry.wait_seconds += waited
        self.timer.wait(waited)

    @torch.no_grad()
    def _apply(self, state: HeaderSent | InFlight, headers: Sequence[Header]) -> None:
        self._stops.hear([header.stop for header in headers], self.all_reduce.ranks)
        self._agreement.hear([header.named for header in headers])
        self._hear_waits([1e-6 * header.wait_microseconds for header in headers])
        if isinstance(state, InFlight):
            if self.arrivals.take_in(state, headers):
                self.timer.restart()
            if state.resets:
                self._portion.reset_worker()
        self._portion.join(state.cohorts)

    def _hear_waits(self, waits: list[float]) -> None:
        """Take in how long each worker has waited, also in fits that this one goes on from."""
        before, self._waits = self._waits or waits, waits
        self._telemetry.count_waits([now - then for now, then in zip(waits, before, strict=True)])
