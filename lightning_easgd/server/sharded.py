"""One worker at all the servers of a center, which it meets as one.

All are asked at once, and an answer is there when each has answered. A server that is away is asked
again and again, while the others have the difference already. So each has every difference once.

[Note: as of one moment] Each server adds its slice of a difference at once, and no two servers do
at the same time. A center that is read meanwhile may have a difference in one slice and not yet in
another. When all workers have their receipts, all slices have the same differences.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.client import (
    CenterClient,
    PendingError,
    Transport,
    UnreachableError,
)
from lightning_easgd.server.form import AS_IT_IS, Form
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.shards import WHOLE, Shard, joined
from lightning_easgd.server.values import News, Receipt, Terms

T = TypeVar("T")

_PAUSE = 0.1
"""Seconds between two questions whether the first worker has brought all of the center."""


class ShardedClient:
    """As a CenterClient of one server, of which it has one for each.

    Args:
        reach: a transport to the server of a slice.
        worker: as of CenterClient.
        model: as of CenterClient.
        incarnation: as of CenterClient.
        patience: as of CenterClient.
    """

    def __init__(
        self,
        reach: Callable[[int], Transport],
        worker: str,
        model: FlatLayout,
        *,
        incarnation: int | None = None,
        patience: float = 60.0,
    ) -> None:
        self._reach, self._model = reach, model
        incarnation = time.time_ns() if incarnation is None else incarnation
        self._who: dict[str, Any] = {"worker": worker, "incarnation": incarnation}
        self._patience = patience
        self._abandoned = threading.Event()
        self._clients = [self._client(WHOLE)]
        self._answers: dict[int, Future[tuple[Receipt, FlatVector | None]]] = {}

    def _client(self, shard: Shard) -> CenterClient:
        transport = self._reach(shard.number)
        return CenterClient(
            transport, model=self._model, shard=shard, patience=self._patience, **self._who
        )

    @property
    def alpha(self) -> float:
        """The smallest that a server said last: each counts the workers by itself."""
        return min(client.alpha for client in self._clients)

    @property
    def tau(self) -> int:
        """What the first server said last; each has heard the same of the workers."""
        return self._clients[0].tau

    @property
    def attempts(self) -> int:
        """How often servers were asked, with repetitions."""
        return sum(client.attempts for client in self._clients)

    @property
    def lost(self) -> str | None:
        """Why the latest call of one has had no answer so far."""
        return next((client.lost for client in self._clients if client.lost), None)

    @property
    def patience(self) -> float:
        """Seconds for which it asks again."""
        return self._patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._patience = seconds
        for client in self._clients:
            client.patience = seconds

    @property
    def pending(self) -> bool:
        """Whether a difference was sent for which one has given no receipt."""
        return any(client.pending for client in self._clients)

    def ask_terms(self) -> Terms:
        """Join the servers, which may have no center yet; raises as :meth:`join`."""
        shards = self._clients[0].ask_shards()
        if shards != len(self._clients):
            self.close()
            self._clients = [self._client(Shard(number, shards)) for number in range(shards)]
        return _common(self._each(CenterClient.ask_terms))

    def join(
        self,
        weights: FlatVector,
        more: Mapping[str, FlatVector] | None = None,
        *,
        moves: int = 0,
    ) -> Terms:
        """Join the servers; the first worker of all brings the center along.

        Args:
            weights: that become the center if there is none.
            more: what goes with it, as of :meth:`get_all`.
            moves: how often that center had moved.

        Raises:
            Refused: a server does not let this worker in.
            UnreachableError: a server did not answer, or has no center while others do.
        """
        more = more or {}
        if not self.ask_terms().has_center and len(self._clients) > 1:
            self._begin_at(weights, more, moves)
        return _common(self._each(lambda client: _join(client, weights, more, moves)))

    def get(self) -> tuple[int, FlatVector]:
        """The version of the center, the smallest of the slices, and the center.

        Raises:
            Refused: a server has another answer.
            UnreachableError: a server did not answer.
        """
        versions, centers = zip(*self._each(CenterClient.get), strict=True)
        return min(versions), joined(self._model, centers)

    def get_all(self) -> tuple[int, dict[str, FlatVector]]:
        """As :meth:`get`, with what goes with the center; as of CenterClient."""
        versions, found = zip(*self._each(CenterClient.get_all), strict=True)
        names = [name for name in found[0] if all(name in each for each in found)]
        vectors = {name: joined(self._model, [each[name] for each in found]) for name in names}
        return min(versions), vectors

    def add(
        self,
        difference: FlatVector,
        form: Form = AS_IT_IS,
        *,
        samples: float = 1.0,
        speed: float = 0.0,
        fetch: bool = False,
    ) -> tuple[Receipt, FlatVector | None]:
        """Have a difference added to the center; as of CenterClient, also if only one raises."""
        if self.pending:
            raise PendingError("An earlier difference has no receipt yet: call resend() first.")

        def add(client: CenterClient) -> tuple[Receipt, FlatVector | None]:
            mine = client.form_of(form, self._model)
            told: dict[str, Any] = {"samples": samples, "speed": speed, "fetch": fetch}
            return client.add(client.slice_of(difference), mine, **told)

        self._answers = self._ask(add, range(len(self._clients)))
        return self._answer()

    def resend(self) -> tuple[Receipt, FlatVector | None]:
        """Ask those again who have given no receipt; raises as :meth:`add`."""
        pending = [number for number, client in enumerate(self._clients) if client.pending]
        self._answers |= self._ask(CenterClient.resend, pending)
        return self._answer()

    def beat(self, **told: Any) -> News:
        """Give a sign of life; as of CenterClient."""
        news = self._each(lambda client: client.beat(**told))
        most = max(news, key=lambda each: each.training)
        return replace(most, stop=any(each.stop for each in news))

    def leave(self) -> None:
        """Tell the servers that this worker ends; raises as :meth:`get`."""
        self._each(CenterClient.leave)

    def abandon(self) -> None:
        """Ask no more, as of CenterClient."""
        self._abandoned.set()
        for client in self._clients:
            client.abandon()

    def close(self) -> None:
        """Close the transports."""
        for client in self._clients:
            client.close()

    def _begin_at(self, weights: FlatVector, more: Mapping[str, FlatVector], moves: int) -> None:
        """Bring the center, or wait until the worker has that was there first.

        It is the one whose weights the first server took. So all slices are of one worker.
        """
        if not weights.is_finite():
            raise Refused(Refusal.NOT_FINITE, "The weights of this worker are not finite.")
        first = self._clients[0]
        if _join(first, weights, more, moves).began:
            return
        gives_up = time.monotonic() + self._patience
        while not _common(self._each(CenterClient.ask_terms)).has_center:
            if time.monotonic() > gives_up or self._abandoned.wait(_PAUSE):
                raise UnreachableError(
                    "Some servers of this center have none, and no worker brings it. Start them"
                    " again with the folders of their snapshots, or all of them in empty ones."
                )

    def _answer(self) -> tuple[Receipt, FlatVector | None]:
        receipts, centers = zip(*(each.result() for each in self._answers.values()), strict=True)
        receipt = Receipt(
            sequence=receipts[0].sequence,
            version=min(each.version for each in receipts),
            staleness=max(each.staleness for each in receipts),
            weight=receipts[0].weight,  # 1 where there are several: see Settings
        )
        return receipt, None if centers[0] is None else joined(self._model, centers)

    def _each(self, what: Callable[[CenterClient], T]) -> list[T]:
        answers = self._ask(what, range(len(self._clients)))
        return [answer.result() for answer in answers.values()]

    def _ask(
        self, what: Callable[[CenterClient], T], numbers: Sequence[int]
    ) -> dict[int, Future[T]]:
        """What the servers of these numbers answer, asked at once; returns when all have."""
        answers: dict[int, Future[T]] = {number: Future() for number in numbers}
        asked = [(answers[number], partial(what, self._clients[number])) for number in numbers]
        # Daemons, as the thread of a courier is.
        threads = [threading.Thread(target=fulfil, args=each, daemon=True) for each in asked[1:]]
        for thread in threads:
            thread.start()
        fulfil(*asked[0])
        for thread in threads:
            thread.join()
        return answers


def fulfil(answer: Future[T], what: Callable[[], T]) -> None:
    """Do something, and let a future have what comes of it."""
    try:
        answer.set_result(what())
    except BaseException as error:
        answer.set_exception(error)


def _join(
    client: CenterClient, weights: FlatVector, more: Mapping[str, FlatVector], moves: int
) -> Terms:
    slices = {name: client.slice_of(vector) for name, vector in more.items()}
    return client.join(client.slice_of(weights), slices, moves=moves)


def _common(terms: list[Terms]) -> Terms:
    """What all say; a center is there if each has its slice.

    Raises:
        ValueError: they contradict each other.
    """
    first, said = terms[0], [_said(each) for each in terms]
    for number, other in enumerate(said):
        if other != said[0]:
            raise ValueError(
                f"Server {number} of this center has {other}, and server 0 has {said[0]}. Give all"
                " the same options."
            )
    return Terms(
        algorithm=first.algorithm,
        options=first.options,
        average=first.average,
        tau=first.tau,
        even=first.even,
        alpha=min(each.alpha for each in terms),
        version=min(each.version for each in terms),
        sequence=first.sequence,
        has_center=all(each.has_center for each in terms),
        began=first.began,
    )


def _said(terms: Terms) -> str:
    """What the servers of one center must have in common."""
    options = {**terms.options, "center_average": terms.average, "even": terms.even}
    more = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{terms.algorithm} with tau={terms.tau}, {more}"
