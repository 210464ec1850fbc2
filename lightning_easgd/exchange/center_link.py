"""How a worker's difference reaches a center behind a server.

    get c ;  d = α (x - c) ;  send d ;  the server: c <- c + d ;  x <- x - d after the local step

[Note: one exchange old] With overlap the server's answer to a difference is the center with it. It
travels behind the local steps that follow, and the next difference is taken from it. So the center
that a worker knows is one exchange old, and each model-sized message hides. Without overlap the
worker waits, first for the newest center and then for the receipt.

[Note: no server] A difference without an answer is kept and sent again until there is one; the
server adds it once. Meanwhile the worker trains on without exchanges, so many rounds at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_easgd.center.flat import FlatVector
from lightning_easgd.center.wire import Wire
from lightning_easgd.communication import OneWay, Stop, codec_name
from lightning_easgd.exchange.arrival import report_non_finite
from lightning_easgd.exchange.asking import Asking
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.consensus import Consensus
from lightning_easgd.exchange.difference import Difference, Participant, Pull
from lightning_easgd.exchange.states import Owed
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.teammates import Teammates
from lightning_easgd.exchange.timing import StepTimer
from lightning_easgd.schedules.even import Even
from lightning_easgd.server.courier import Courier
from lightning_easgd.server.form import Form
from lightning_easgd.server.model import precision
from lightning_easgd.server.values import News, Receipt

log = logging.getLogger(__name__)

_PAUSE = 0.2
"""Seconds between two questions whether others have finished."""


class CenterLink:
    """Sends a worker's difference to a server, and takes over the center that it answers.

    Args:
        participant: takes the differences.
        courier: brings them to the server, of which the worker knows the terms.
        clock: counts this worker's samples.
        stops: what ends this worker's training.
        overlap: whether they travel while the worker trains.
        timeout: seconds that this worker waits for a server that is gone, or at the end for
            workers that are stuck.
        max_offline_rounds: how many exchanges in a row it leaves out before it does.
        while_waiting: is called now and then while it waits for those that it was started with.
    """

    def __init__(
        self,
        participant: Participant,
        courier: Courier,
        *,
        clock: Clock,
        stops: Stops,
        overlap: bool,
        timeout: float,
        max_offline_rounds: int,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock, self._stops = clock, stops
        self.timer = StepTimer()
        self.owed: Owed | None = None
        self.all_reduce = participant.all_reduce
        self._participant = participant
        self._rule = participant.rule
        self._telemetry = participant.telemetry
        self._courier = courier
        self._wire = Wire(participant.center)
        self._sent = self._wire.vector()
        self._bytes = Form().byte_size(self._wire.layout)
        assert isinstance(participant.all_reduce, OneWay)
        self._codes = participant.all_reduce
        buffers = {precision(dtype): count for dtype, count in self._wire.buffers.items()}
        self._form = Form(codec_name(self._codes.codec), buffers)
        self._fetches = overlap or self._rule.resets_to_center
        self._most_missed, self._timeout = max_offline_rounds, timeout
        self._while_waiting = while_waiting
        self._asking = Asking(courier, self._telemetry, self.timer, timeout=timeout)
        self._stood: FlatVector | None = None
        """Where a worker that restarts at the center was when it sent."""
        self.start_training()

    @property
    def resets_workers(self) -> bool:
        """None restarts at a center that is under way."""
        return False

    def start_training(self) -> None:
        """Begin as if there had been no exchange yet."""
        self._missed = 0
        self._trained_on = False
        self._exchanged_at: int | None = None
        self._samples = self._clock.samples
        """Behind all that was sent."""

    def forget_owed(self) -> None:
        """It goes on from where it is anyway."""

    def begin(self, *, goes_on: bool) -> bool:
        """Join the server, which takes this worker's weights if it has no center, and begin there.

        Arguments and result are those of :meth:`Link.begin`.

        Raises:
            Refused: the server does not let this worker in.
            UnreachableError: no server answered.
            ValueError: parameters were replaced since the worker first asked.
        """
        center = self._participant.center
        if Wire(center).layout.slots != self._wire.layout.slots:
            raise ValueError(
                "Hooks replaced, added or tied parameters after the worker had told the server its"
                " model. Do that in configure_model, or leave center out."
            )
        weights = self._wire.vector()
        self._wire.read_(weights)
        client = self._courier.client
        more, moves = self._wire.goes_along(), self._wire.fragment.moves
        self._courier.ask(lambda: client.join(weights, more, moves=moves)).result()
        newest = self._courier.ask(client.get_all).result()
        self._courier.ask(self._courier.beat).result()
        self._courier.began = True
        client.patience = math.inf  # from now on this link knows how long to wait
        self._take_all(newest)
        if not goes_on:
            center.overwrite_worker()
        return False

    def stop_all(self) -> None:
        """Let those that were started with this worker stop, too. Signal-safe."""
        self._courier.stops = True

    def arrived(self) -> bool:
        """Whether the server has answered."""
        return self._asking.answered()

    def go_on(self, clock: float = math.inf) -> None:
        """The worker goes on by itself."""

    @torch.no_grad()
    def start(self, clock: int, *, last: bool = False) -> Pull:
        """Send this worker's difference off, as of Link, unless no server answers."""
        if self._courier.told_to_stop:
            self._stops.hear([Stop.ENOUGH], [0])
            self._stops.take_effect()
        if not self._has_answer(patiently=last):
            return []
        _require_no_more(self._participant)
        difference = self._participant.take_difference(0)
        given = self._participant.contribute(difference, clock=clock, index=0, last=last)
        self._exchanged_at = clock
        if difference.healthy:
            self._send(difference, last=last)
        else:
            self._telemetry.non_finite += 1
            self._samples = self._clock.samples
            rank = self._participant.center.rank
            report_non_finite(clock, {rank: False}, reports=True, all_of_them=False)
        self.timer.exchange()
        self.timer.report(self._telemetry)
        return given.pull

    def finish(self, clock: int, *, exchange: bool) -> None:
        """Send what is left if it is wanted, and have the newest center.

        Raises:
            ExchangeError: no server answered, or those that were started together are stuck.
        """
        self._asking.wait_patiently()
        if exchange and not (self._rule.resets_to_center and self._exchanged_at == clock):
            self.start(clock, last=True)
            self._asking.wait_patiently()
        elif self.all_reduce.has_residual:
            self._wire.pack_nothing_(self._sent)
            self._send_packed(last=True)
            self._asking.wait_patiently()
        self._courier.finished = True
        self._await_team()
        self._asking.ask(self._courier.client.get_all, self._take_all)
        self._asking.wait_patiently()

    def _await_team(self) -> None:
        """Wait for those that were started with this worker, so that all deliver one center."""
        others, training = Teammates(self._timeout), -1

        def hear(news: News) -> None:
            nonlocal training
            training = news.training
            others.hear(news)

        while training:
            if training > 0:
                time.sleep(_PAUSE)
            self._asking.ask(self._courier.beat, hear)
            self._asking.wait_patiently()
            self._while_waiting()

    def wait(self) -> None:
        """Wait for an answer, if one is expected, unless the server is gone."""
        self._trained_on |= not self._asking.wait()

    def _fetch(self) -> None:
        """Have the center that is the newest, unless the server is gone."""
        if not self._asking.pending:
            self._asking.ask(self._courier.client.get, self._take_center)
            self.wait()

    def refresh(self) -> None:
        """Let the center here be the newest that there is, unless the server is gone."""
        if not self._asking.pending:
            self._asking.ask(self._courier.client.get_all, self._take_all)
            self.wait()

    def state(self) -> dict[str, Any]:
        """As of a link to all workers; what has no answer is not in it."""
        consensus = Consensus(1).state()
        return {"fragment_index": 0, "exchanged": None, "owed": None, "consensus": consensus}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The server knows the rest."""

    def _has_answer(self, *, patiently: bool) -> bool:
        """Whether nothing is under way; if no server answers, a round is left out instead."""
        if not self._fetches:
            self._fetch()
        if not self._asking.pending:
            self._missed = 0
            return True
        self._missed += 1
        if self._missed == 1:
            log.warning(
                "No server answers (%s). This worker trains on without exchanges, for %d rounds at"
                " most.",
                *(self._courier.client.lost, self._most_missed),
            )
        if self._missed <= self._most_missed and not patiently:
            return False
        self._asking.wait_patiently()
        return self._has_answer(patiently=patiently)

    def _send(self, difference: Difference, *, last: bool) -> None:
        (fragment,) = difference.fragments
        buffers = self._participant.center.statistics.brought()
        self._wire.pack_(self._sent, fragment.total, *buffers)
        if self._rule.resets_to_center:
            self._stood = (fragment.start or fragment.center).clone()
            torch._foreach_add_(self._stood.parts, fragment.total.parts)
        self._send_packed(last=last)

    def _send_packed(self, *, last: bool) -> None:
        form = replace(self._form, codec=None) if last else self._form
        self._trained_on = False
        samples = max(1, self._clock.samples - self._samples)
        self._samples = self._clock.samples
        self._asking.ask(lambda: self._add(form, samples), self._take_receipt)
        self._telemetry.bytes_sent += form.byte_size(self._wire.layout)

    @torch.no_grad()
    def _add(self, form: Form, samples: int) -> tuple[Receipt, FlatVector | None]:
        """Have what is packed added, and what was kept; the courier does it."""
        with self._codes.keeping(self._wire.parameters(self._sent)):
            client, fetch = self._courier.client, self._fetches
            told: dict[str, Any] = {"samples": samples, "speed": self._speed(), "fetch": fetch}
            return client.add(self._sent, form, **told)

    def _speed(self) -> float:
        step = self._telemetry.step_seconds
        return 1 / step if step else 0.0

    def _take_center(self, answer: tuple[int, FlatVector]) -> None:
        self._wire.write(answer[1])
        self._telemetry.bytes_received += self._bytes

    def _take_all(self, answer: tuple[int, dict[str, FlatVector]]) -> None:
        version, vectors = answer
        if self._rule.resets_to_center:
            self._wire.fragment.own_start()  # from where what the worker makes still counts
        along = {name: vector for name, vector in vectors.items() if name != "center"}
        self._take_center((version, vectors["center"]))
        self._wire.take_along(along, version)
        self._telemetry.bytes_received += len(along) * self._bytes

    def _take_receipt(self, answer: tuple[Receipt, FlatVector | None]) -> None:
        receipt, center = answer
        self._telemetry.count_staleness(receipt.staleness)
        schedule = self._clock.period.schedule
        if isinstance(schedule, Even):
            schedule.hear(self._courier.client.tau)
        if receipt.weight != 1 and not self._rule.resets_to_center:
            self._wire.pull(self._sent, receipt.weight - 1)
        if center is None:
            self._wire.add(self._sent, receipt.weight)
            return
        if not self._rule.resets_to_center:
            self._take_center((receipt.version, center))
            return
        fragment, stood = self._wire.fragment, self._stood
        fragment.start = None
        self._take_center((receipt.version, center))
        if self._trained_on and stood is not None:  # and keeps what that made
            torch._foreach_sub_(stood.parts, fragment.center.parts)
            fragment.pull(stood)
        else:
            fragment.reset_to_center(self._rule.mixing_rate)


def _require_no_more(participant: Participant) -> None:
    """Check that no parameter joined the training.

    Raises:
        ValueError: one did, of which the server knows nothing.
    """
    if late := participant.center.cohorts[1:]:
        raise ValueError(
            f"Parameter '{late[0].names[0]}' was unfrozen after the worker had told the server its"
            " model, which all its workers share. Let it require gradients from the beginning, with"
            " a learning rate of 0 for as long as it is to stay as it is; or leave center out."
        )
