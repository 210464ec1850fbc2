"""A worker's side: asks a server again until it answers, and never twice for one difference.

[Note: pending] Whoever gives up on an answer does not know whether the difference was added. So the
client keeps it, with its sequence, and sends no other before that one has its receipt.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server.answers import LostError, read_answer
from lightning_easgd.server.deadlines import Deadline
from lightning_easgd.server.form import AS_IT_IS, Form
from lightning_easgd.server.frames import cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.model import bytes_of, describe, precision
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.shards import WHOLE, Shard
from lightning_easgd.server.standing import NotPrimary
from lightning_easgd.server.values import News, Receipt, Terms

_PAUSES = (0.02, 2.0)
"""Seconds between two attempts, at first and at most."""


_LOST_CENTER = (
    "The server was restarted without its center. Give it the folder of its snapshots, or start"
    " the workers again to begin anew."
)


class UnreachableError(ConnectionError):
    """No server answered for as long as the client is patient."""


class PendingError(RuntimeError):
    """An earlier difference has no receipt yet, or none waits for one."""


class Transport(Protocol):
    """Carries the frames of a message to a server, and those of its answer back."""

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        """The frames of the answer.

        Args:
            frames: of the message; read at most once.
            deadline: seconds that all of it may take.

        Raises:
            LostError: also while the frames are read; the next call may go to another server.
        """

    def close(self) -> None:
        """Let go of what it holds."""


class InMemory:
    """A transport within one process.

    Args:
        handler: of the server.
        sender: as the server sees it.
    """

    def __init__(self, handler: Handler, sender: str = "memory") -> None:
        self._handler = handler
        self._sender = sender

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        """The frames of the answer."""
        try:
            yield from self._handler.answer(frames, self._sender)
        except NotPrimary as error:
            raise LostError(str(error)) from error

    def close(self) -> None:
        """Nothing is held."""


class CenterClient:
    """One worker at a server; for one thread at a time.

    Args:
        transport: to the server; closed with the client.
        worker: its name, of 1 to 64 visible ASCII characters, and of no other worker.
        model: of the worker.
        shard: the slice that the server has. All vectors here are of it.
        incarnation: of this process, larger than of any before; None: the time.
        patience: seconds for which it asks again.
        clock: gives seconds.
        sleep: waits for seconds; None: until :meth:`abandon`, if that is sooner.

    Attributes:
        alpha: α of the next difference, as the server said last.
        tau: steps up to the next difference, as the server said with a receipt; 0: not yet.
        attempts: how often the server was asked, with repetitions.
        lost: why the latest call has had no answer so far; None: it has one, or is the first.
    """

    def __init__(
        self,
        transport: Transport,
        worker: str,
        model: FlatLayout,
        *,
        shard: Shard = WHOLE,
        incarnation: int | None = None,
        patience: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.alpha, self.tau = 0.0, 0
        self.attempts = 0
        self.lost: str | None = None
        self.patience = patience
        self._transport = transport
        incarnation = time.time_ns() if incarnation is None else incarnation
        self._who = {"worker": worker, "incarnation": incarnation}
        self._shard, self._model = shard, shard.layout(model)
        self._abandoned = threading.Event()
        self._clock, self._sleep = clock, sleep or self._abandoned.wait
        self._sequence = 0
        self._fence = 0
        self._pending: tuple[dict[str, Any], Sequence[memoryview]] | None = None
        self._deadlines: defaultdict[str, Deadline] = defaultdict(Deadline)
        self._jitter = random.Random(f"{self._who}")

    def ask_shards(self) -> int:
        """How many servers have a slice of the center each; raises as :meth:`get`."""
        said, _ = self._ask({"do": "shards"})
        return int(said["shards"])

    def slice_of(self, vector: FlatVector) -> FlatVector:
        """The slice of a vector of the whole model; it shares its memory."""
        return self._shard.slice_of(vector, self._model)

    def form_of(self, form: Form, whole: FlatLayout) -> Form:
        """The form in which the slice travels of a vector that travels in this one."""
        sizes = {precision(dtype): size for dtype, size in whole.sizes.items()}
        here = {name: self._shard.tail(sizes[name], n) for name, n in form.buffers.items()}
        return Form(form.codec, {name: count for name, count in here.items() if count})

    def ask_terms(self) -> Terms:
        """Join the server, which may have no center yet; raises as :meth:`join`."""
        return self._join()

    def join(
        self,
        weights: FlatVector,
        more: Mapping[str, FlatVector] | None = None,
        *,
        moves: int = 0,
    ) -> Terms:
        """Join the server; the first worker of all brings the center along.

        Args:
            weights: that become the center if the server has none.
            more: what goes with it, as of :meth:`get_all`.
            moves: how often that center had moved.

        Raises:
            Refused: the server does not let this worker in.
            UnreachableError: no server answered.
        """
        terms = self._join()
        if not terms.has_center:
            terms = self._join({"center": weights, **(more or {})}, moves)
        self._sequence = terms.sequence
        return terms

    def get(self) -> tuple[int, FlatVector]:
        """The version of the center, and the center.

        Raises:
            Refused: the server has another answer.
            UnreachableError: no server answered.
        """
        said, vectors = self._ask({"do": "get"})
        return said["version"], vectors["center"]

    def get_all(self) -> tuple[int, dict[str, FlatVector]]:
        """As :meth:`get`, with what goes with the center, by name: its average, momentum."""
        said, vectors = self._ask({"do": "get", "all": True})
        return said["version"], vectors

    def add(
        self,
        difference: FlatVector,
        form: Form = AS_IT_IS,
        *,
        samples: float = 1.0,
        speed: float = 0.0,
        fetch: bool = False,
    ) -> tuple[Receipt, FlatVector | None]:
        """Have a difference added to the center.

        Args:
            difference: α (x - c), or what the worker's steps made; becomes what arrives of it, and
                must stay so meanwhile.
            form: in which it travels.
            samples: that the worker learned from since its last difference.
            speed: of the worker, in steps per second; 0: it is not known.
            fetch: whether the new center comes back.

        Returns:
            The receipt, and the new center if it was asked for.

        Raises:
            Refused: the difference was not added.
            UnreachableError: no server answered. Perhaps it was added: call :meth:`resend` until
                the receipt is there.
            PendingError: an earlier difference has no receipt yet.
        """
        if self._pending is not None:
            raise PendingError("An earlier difference has no receipt yet: call resend() first.")
        self._sequence += 1
        asked = {"do": "add", "sequence": self._sequence, "samples": samples, "speed": speed}
        payload = form.encode_(difference)
        self._pending = {**asked, "fetch": fetch, **form.text()}, payload
        return self.resend()

    @property
    def pending(self) -> bool:
        """Whether a difference was sent that has no receipt."""
        return self._pending is not None

    def resend(self) -> tuple[Receipt, FlatVector | None]:
        """Ask again for the receipt of the difference that has none; raises as :meth:`add`."""
        if self._pending is None:
            raise PendingError("No difference waits for a receipt: call add().")
        asked, payload = self._pending
        try:
            said, vectors = self._ask(asked, payload)
        except Refused:
            self._pending, self._sequence = None, self._sequence - 1
            raise
        self._pending = None
        return Receipt(**said), vectors.get("center")

    def beat(
        self,
        *,
        team: int,
        progress: int,
        finished: bool,
        stops: bool,
        saves: dict[str, str],
        once: bool = False,
    ) -> News:
        """Give a sign of life, and hear how the team is; raises as :meth:`get`.

        Args:
            team: how many workers were started together.
            progress: a count that rises while this one trains.
            finished: whether this one has sent all that it had.
            stops: whether all of them are to stop.
            saves: as of News, which worker 0 of the team says.
            once: whether the server is asked once only, and LostError raised if that fails.
        """
        asked: dict[str, Any] = {"do": "beat", "team": team, "progress": progress}
        asked |= {"finished": finished, "stops": stops, "saves": saves}
        said, _ = self._ask_once(asked) if once else self._ask(asked)
        return News(**said)

    def leave(self) -> None:
        """Tell the server that this worker ends; raises as :meth:`get`."""
        self._ask({"do": "leave"})

    def abandon(self) -> None:
        """Ask no more: who waits for an answer in another thread gets UnreachableError."""
        self._abandoned.set()

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()

    def _join(self, vectors: Mapping[str, FlatVector] | None = None, moves: int = 0) -> Terms:
        shard, vectors = [self._shard.number, self._shard.of], vectors or {}
        asked = {"do": "join", "shard": shard, "model": describe(self._model)}
        brought = {"vectors": list(vectors), "moves": moves} if vectors else {}
        payload = [piece for each in vectors.values() for piece in bytes_of(each)]
        said, _ = self._ask({**asked, **brought}, payload)
        return Terms(alpha=self.alpha, **said)

    def _ask(
        self, asked: dict[str, Any], payload: Sequence[memoryview] = ()
    ) -> tuple[dict[str, Any], dict[str, FlatVector]]:
        """The answer; asked again after what may pass, and joined again at a restarted server."""
        give_up, pause = self._clock() + self.patience, _PAUSES[0]
        while True:
            lost: Exception
            if self._abandoned.is_set():
                raise UnreachableError("This worker asks no more.")
            try:
                return self._ask_once(asked, payload)
            except LostError as error:
                lost, self.lost = error, str(error)
            except Refused as refused:
                lost = refused
                if asked["do"] in ("get", "add") and refused.reason is Refusal.NO_CENTER:
                    raise Refused(Refusal.NO_CENTER, _LOST_CENTER) from None
                if (
                    asked["do"] in ("get", "add", "beat")
                    and refused.reason is Refusal.UNKNOWN_WORKER
                ):
                    self._join()  # a server that was restored from before this worker came
                elif refused.reason.ends:
                    raise
                elif refused.reason is Refusal.NOT_KEPT:
                    self.lost = str(refused)  # for as long as its disk is full
            if self._clock() > give_up:
                raise UnreachableError(
                    f"No server answered worker '{self._who['worker']}' within"
                    f" {self.patience:g} s ({lost}). Start it again, or check its address."
                ) from lost
            self._sleep(pause * self._jitter.uniform(0.5, 1.0))
            pause = min(2 * pause, _PAUSES[1])

    def _ask_once(
        self, asked: dict[str, Any], payload: Sequence[memoryview] = ()
    ) -> tuple[dict[str, Any], dict[str, FlatVector]]:
        self.attempts += 1
        began, deadline = self._clock(), self._deadlines[asked["do"]]
        message = cut({**self._who, **asked, "fence": self._fence}, payload)
        try:
            answer = self._transport.call(message, deadline.seconds)
            said, vectors = read_answer(answer, self._model)
        except LostError:
            deadline.lost(self._clock() - began)
            raise
        fence = said.pop("fence", 0)
        if fence < self._fence:
            raise LostError("a server answered in whose place another one serves")
        self._fence, self.lost = fence, None
        if "refused" in said:
            raise Refused(Refusal(said["refused"]), said["message"])
        deadline.met(self._clock() - began)
        self.alpha = said.pop("alpha", self.alpha)
        if "weight" in said:  # with a receipt
            self.tau = said.pop("tau")
        return said, vectors
