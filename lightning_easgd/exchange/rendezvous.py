"""Which workers wait for which where they are idle, finish and stop.

[Note: idle workers] Workers may have different numbers of batches. One that has no step to take is
idle: it sends a header that says so and reads the headers of the others. If one of them began an
exchange, it shadows that: like a worker whose gradients are zero, it is pulled and pulls. Nothing
is counted twice, since it loses what it gives to the center. When all are idle they go on together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning_easgd.center.center import Center
from lightning_easgd.communication import Header, Phase, Stop, verify_phases
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.difference import Pull, pull_worker
from lightning_easgd.exchange.gradient_averaging import GradientAverage
from lightning_easgd.exchange.link import CollectiveLink
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.tree import Levels


class Rendezvous(ABC):
    """Where a worker meets the others, if it does."""

    @abstractmethod
    def meet(self, phase: Phase) -> bool:
        """Be idle until the workers that this one needs are idle, too.

        Args:
            phase: where this worker is idle; not in training.

        Returns:
            False if all stop.
        """

    @abstractmethod
    def finish(self, *, exchange: bool) -> None:
        """Training has ended: give the center all that it is owed, with a last exchange if wanted.

        All have met at the end before.
        """

    @abstractmethod
    def request_stop(self, why: Stop) -> bool:
        """Ask all to stop with this worker. Signal-safe.

        Returns:
            False if they cannot be asked any more.
        """

    @abstractmethod
    def reopen(self) -> None:
        """Another training begins."""


class Lockstep(Rendezvous):
    """All workers take the same number of steps, or wait for those that take more.

    Args:
        levels: what is exchanged with whom.
        link: of all workers, on top of them.
        clock: of all workers.
        center: of this worker's module.
        stops: what workers agree on.
        gradients: averages those of this worker with others'; None: nothing does.
        overlap: whether sums travel while workers train.
    """

    def __init__(
        self,
        levels: Levels,
        *,
        link: CollectiveLink,
        clock: Clock,
        center: Center,
        stops: Stops,
        gradients: GradientAverage | None,
        overlap: bool,
    ) -> None:
        self._levels = levels
        self._link = link
        self._clock = clock
        self._center = center
        self._stops = stops
        self._gradients = gradients
        self._overlap = overlap
        self._last_header_left = False

    def meet(self, phase: Phase) -> bool:
        """Be idle until all workers are, and shadow the exchanges of those that still train.

        The clocks are then set to the latest. A worker at the end of its fit waits until all are at
        theirs, however long they train. Workers that stop together leave here.

        Args:
            phase: where this worker is idle; not in training.

        Returns:
            False if all stop; Stops tells why.

        Raises:
            ExchangeError: a worker left, did not come in time, or is out of step.
            NonFiniteError: no worker had finite weights.
        """
        while True:
            headers = self._wait_idle(phase)
            if headers is None:
                continue
            self._levels.drain()
            self._clock.steps = max(header.clock for header in headers)
            self._levels.catch_up(self._clock.steps)
            if self._stops.stopping.by_exception:
                return False
            verify_phases(headers)
            if phase is not Phase.FIT_END or all(h.phase is phase for h in headers):
                return True

    def _wait_idle(self, phase: Phase) -> Sequence[Header] | None:
        """The headers if all workers are idle; None if an exchange was shadowed instead."""
        if self._gradients is not None:
            self._link.go_on()  # before weights of others are taken over
            self._gradients.shadow()
        self._shadow_members(phase)
        self._levels.drain()
        self._stops.take_effect()
        self._center.adopt_unfrozen()
        self._link.announce_idle(self._clock.steps, phase)
        headers = self._link.headers()
        training = [header.clock for header in headers if header.phase is Phase.TRAINING]
        if not training:
            return headers
        self._clock.set(training[0])
        pull_worker(self._link.shadow(self._clock.steps))
        if not self._overlap or self._link.resets_workers:
            self._link.wait()  # when workers that train do
        return None

    def _shadow_members(self, phase: Phase) -> None:
        """Shadow the exchanges of members of groups that still train, until none does."""
        if self._levels:
            self._center.adopt_unfrozen()
        steps = self._clock.steps
        for clock in self._levels.shadow(steps, phase, self._announce, self._shadow_top):
            self._clock.steps = clock
            if not self._overlap:
                self._levels.wait()

    def _announce(self, clock: int, phase: Phase) -> bool:
        """Say that this worker is idle, if all workers exchange at this step; whether they do."""
        if clock < self._clock.next_due:
            return False
        self._link.wait()
        self._stops.take_effect()
        self._link.announce_idle(clock, phase)
        self._clock.set(clock)
        return True

    def _shadow_top(self, clock: int) -> Pull:
        """Take part in the exchange of all workers, when all have said what they do."""
        self._link.headers()
        return self._link.shadow(clock)

    def finish(self, *, exchange: bool) -> None:
        """A last exchange of everything if wanted; else the residual goes to the center."""
        self._last_header_left = True
        clock = self._clock.steps
        if exchange:
            self._levels.finish(clock)
        settled = self._link.is_settled(clock)
        for index in range(self._center.main.fragment_count):
            is_new = not (settled and index == self._center.main.fragment_count - 1)
            if exchange and is_new:
                self._link.start(clock, last=True)
            else:
                self._link.flush_residual(clock)
            self._levels.drain()
        self._stops.take_effect()

    def request_stop(self, why: Stop) -> bool:
        """Ask all workers to stop at the same step. Signal-safe.

        They do within two periods; within three if this worker is idle and its header has left.

        Returns:
            False if no header will leave that could say so.
        """
        if self._last_header_left:
            return why is Stop.PREEMPTED  # there is nothing left to be saved and gone on with
        self._stops.request(why)
        return True

    def reopen(self) -> None:
        """Another training begins, in which headers leave."""
        self._last_header_left = False
        self._stops.forget()
