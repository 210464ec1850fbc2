"""A worker on its own: it waits for nobody, and nobody waits for it."""

from __future__ import annotations

from typing_extensions import override

from lightning_easgd.communication import Phase, Stop
from lightning_easgd.exchange.center_link import CenterLink
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.rendezvous import Rendezvous
from lightning_easgd.exchange.stops import Stops


class Solo(Rendezvous):
    """The rendezvous of a worker whose center is behind a server.

    Args:
        link: to the server.
        clock: of this worker.
        stops: what ends its training.
        leads: whether others that were started with it end with it.
    """

    def __init__(self, link: CenterLink, *, clock: Clock, stops: Stops, leads: bool) -> None:
        self._link = link
        self._leads = leads
        self._clock = clock
        self._stops = stops
        self._finished = False

    @override
    def meet(self, phase: Phase) -> bool:
        """There is nobody to be awaited.

        Returns:
            False if this worker stops.
        """
        self._link.wait()
        return not self._stops.stopping.by_exception

    @override
    def finish(self, *, exchange: bool) -> None:
        """The last difference, if it is wanted; the server has all when this returns."""
        self._finished = True
        self._link.finish(self._clock.steps, exchange=exchange)

    @override
    def request_stop(self, why: Stop) -> bool:
        """Let this worker stop with its next step. Signal-safe.

        If worker 0 has had enough, so have those that were started with it.
        """
        if self._finished:
            return why is Stop.PREEMPTED  # there is nothing left to be saved and gone on with
        if why is Stop.ENOUGH and self._leads:
            self._link.stop_all()
        self._stops.request(why)
        self._stops.hear([self._stops.requested], [0])
        self._stops.take_effect()
        return True

    @override
    def reopen(self) -> None:
        """Another training begins."""
        self._finished = False
        self._stops.forget()
