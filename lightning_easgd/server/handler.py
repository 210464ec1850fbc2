"""Answers the messages of workers, however they come; one at a time asks the center."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_easgd.center.flat import FlatVector
from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.center_state import RULE_STATE
from lightning_easgd.server.form import form_of
from lightning_easgd.server.frames import Message, allocate, cut
from lightning_easgd.server.model import byte_size, bytes_of, layout_of, vectors_on
from lightning_easgd.server.refusal import Refusal, Refused, malformed
from lightning_easgd.server.standing import NotPrimary, Primary, Standing
from lightning_easgd.server.teams import MOST_SAVES, Teams

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\x21-\x7e]{1,64}")
_MOST = 2**63

_KEPT = 4
_SIGN_SECONDS = 1.0
"""Between two signs of life within a message that takes long."""

_LONGEST = 1024
"""Characters of a checkpoint's name."""

Answer = list[bytes]
"""Frames, made while the server is not asked by another."""


class Handler:
    """Turns messages into calls of a server, and what it says into messages.

    Whatever comes in, a message that is none leaves the center as it was, and is answered.

    Args:
        server: is asked by one thread at a time.
        clock: gives seconds.
        primary: what this server is to a standby; None: it has none.

    Attributes:
        lock: held while the server is asked.
        changed: said when a difference came, or a standby has one.
        clock: gives seconds.
        refused: how often each sender was refused, by reason.
    """

    def __init__(
        self,
        server: CenterServer,
        clock: Callable[[], float] = time.monotonic,
        primary: Primary | None = None,
    ) -> None:
        self.server = server
        self.primary = primary or Primary(Standing(), "")
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.refused: Counter[tuple[str, Refusal]] = Counter()
        self.clock = clock
        self._teams = Teams()
        self._free: deque[Tensor] = deque(maxlen=_KEPT)
        """Memory of differences, which took as long to get as to fill."""
        self._operations: dict[Any, Callable[[Message], Answer]] = {
            "shards": self._shards,
            "join": self._join,
            "get": self._get,
            "add": self._add,
            "leave": self._leave,
            "beat": self._beat,
        }

    def answer(self, frames: Iterable[bytes], sender: str, site: str = "") -> Iterator[bytes]:
        """The frames of the answer to a message.

        Args:
            frames: of the message. What they raise goes on to the caller.
            sender: for the log.
            site: of the sender, as its certificate says; it speaks for workers of this site only.

        Raises:
            NotPrimary: another server is to be asked.
        """
        message: Message | None = None

        def alive(frames: Iterable[bytes]) -> Iterator[bytes]:
            """Each frame, also of an answer, is a sign of life of the worker that is known."""
            heard = self.clock()
            for frame in frames:
                yield frame
                if message is not None and self.clock() - heard >= _SIGN_SECONDS:
                    heard = self.clock()
                    self._hear_of(message)

        try:
            message = Message(alive(frames), site)
            self._require_primary(message)
            operation = message.text.get("do")
            if not isinstance(operation, str) or operation not in self._operations:
                raise malformed("do", operation, ", ".join(map(repr, self._operations)))
            answer = self._operations[operation](message)
        except Refused as refused:
            self._note(sender, refused)
            answer = self._say({"refused": refused.reason.value, "message": str(refused)})
        yield from alive(answer)

    def _hear_of(self, message: Message) -> None:
        with suppress(Refused), self.lock:
            self.server.beat(*_sender(message), now=self.clock())

    def _say(self, said: dict[str, Any], payload: Sequence[memoryview] = ()) -> Answer:
        return list(cut({**said, "fence": self.primary.standing.fence}, payload))

    def _require_primary(self, message: Message) -> None:
        fence = _whole(message, "fence") if "fence" in message.text else 0
        with self.lock:
            if fence > self.primary.standing.fence:
                raise NotPrimary("Another server has taken over from this one.")
            if not self.primary.answers(self.clock()):
                raise NotPrimary("This server is a standby, or waits for its standby.")

    def _wait_until_kept(self, version: int) -> None:
        """Wait for the standby, while it may not have taken over; the lock is held.

        Raises:
            NotPrimary: it is silent, or says again and again that it does not have it.
        """
        primary = self.primary
        give_up = self.clock() + 10 * primary.lease
        while not primary.has_kept(version):
            if not primary.answers(self.clock()) or self.clock() > give_up:
                raise NotPrimary("The standby of this server is silent.")
            self.changed.wait(primary.lease / 8)

    def _note(self, sender: str, refused: Refused) -> None:
        """Log the first refusal of a sender for a reason, and then ever fewer."""
        with self.lock:
            if len(self.refused) > 10_000:  # a sender may have many addresses
                self.refused.clear()
            self.refused[sender, refused.reason] += 1
            times = self.refused[sender, refused.reason]
        if refused.reason is not Refusal.WAIT_FOR_TURN and times & (times - 1) == 0:
            log.warning("%s was refused for the %d. time: %s", sender, times, refused)

    def _shards(self, message: Message) -> Answer:
        message.payload(0)
        return self._say({"shards": self.server.settings.shards})

    def _join(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        self._require_shard(message.text.get("shard"))
        model = layout_of(message.text.get("model"), self.server.settings.limits.most_bytes)
        more: dict[str, FlatVector] = {}
        if message.payload_bytes and not self.server.has_center:
            names = _names(message)
            memory = message.payload(len(names) * byte_size(model))
            more = dict(zip(names, vectors_on(model, memory, len(names)), strict=True))
        weights = more.pop("center", None)
        moves = _whole(message, "moves") if more else 0
        with self.lock:
            now = self.clock()
            terms = self.server.join(
                *(worker, incarnation, model), now=now, weights=weights, more=more, moves=moves
            )
        return self._say(asdict(terms))

    def _require_shard(self, theirs: object) -> None:
        settings = self.server.settings
        if theirs != [settings.shard, settings.shards]:
            raise Refused(
                Refusal.OTHER_SHARD,
                f"This server has shard {settings.shard} of {settings.shards} of its center, and"
                f" was asked for {theirs!r:.80}. Give workers the address of shard 0, and have"
                " those of the others at the next ports.",
            )

    def _get(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        message.payload(0)
        with self.lock:
            now = self.clock()
            version, found = self.server.vectors(worker, incarnation, now=now)
            if message.text.get("all") is not True:
                found = {"center": found["center"]}
            said = {"version": version, "alpha": self.server.alpha(now), "vectors": list(found)}
            payload = [piece for each in found.values() for piece in bytes_of(each)]
            self._count(worker, 0, payload, now)
            return self._say(said, payload)

    def _add(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        sequence = _whole(message, "sequence")
        fetch = message.text.get("fetch", False) is True
        samples, speed = (message.text.get(*each) for each in (("samples", 1.0), ("speed", 0.0)))
        if type(samples) not in (int, float) or not 0 < samples < _MOST:
            raise malformed("samples", samples, "a positive number")
        if type(speed) not in (int, float) or not 0 <= speed < _MOST:
            raise malformed("speed", speed, "a number of steps per second")
        layout = self.server.layout
        memory = self._memory(byte_size(layout))
        form = form_of(message.text, layout)
        given = (worker, incarnation, sequence, form.decode(message, layout, memory))
        options: dict[str, Any] = {"samples": samples, "buffers": form.buffers}
        with self.lock:
            now = self.clock()
            center: list[memoryview] = []
            named: list[str] = []
            if fetch:
                receipt, vector = self.server.exchange(*given, now=now, **options)
                center, named = bytes_of(vector), ["center"]
            else:
                receipt = self.server.add(*given, now=now, **options)
            self._count(worker, message.payload_bytes, center, now)
            tau = self.server.period(worker, incarnation, speed, now=now)
            said = {"tau": tau, "alpha": self.server.alpha(now), "vectors": named}
            said |= asdict(receipt)
            answer = self._say(said, center)
            self.changed.notify_all()
            self._wait_until_kept(receipt.version)
        self._free.append(memory)
        return answer

    def _count(self, worker: str, received: int, sent: Sequence[memoryview], now: float) -> None:
        """Count the bytes of vectors; the lock is held."""
        known = self.server.workers(now)[worker]
        known.received += received
        known.sent += sum(piece.nbytes for piece in sent)

    def _memory(self, size: int) -> Tensor:
        """Memory for a difference: that of an earlier one, if it has the size."""
        with suppress(IndexError):
            if (memory := self._free.pop()).numel() == size:
                return memory
        return allocate(size)

    def _leave(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        message.payload(0)
        with self.lock:
            self.server.leave(worker, incarnation, now=self.clock())
        return self._say({})

    def _beat(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        size, progress = _whole(message, "team"), _whole(message, "progress")
        saves, message_says = _saves(message), message.text.get
        message.payload(0)
        with self.lock:
            now = self.clock()
            self.server.beat(worker, incarnation, now=now)
            news = self._teams.hear(
                worker,
                size=size,
                progress=progress,
                finished=message_says("finished") is True,
                stops=message_says("stops") is True,
                saves=saves,
                there=self.server.workers(now),
                now=now,
            )
        return self._say(asdict(news))


def _sender(message: Message) -> tuple[str, int]:
    worker = message.text.get("worker")
    if not isinstance(worker, str) or not _NAME.fullmatch(worker):
        raise malformed("worker", worker, "a name of 1 to 64 visible ASCII characters")
    # No worker's name has a space, so what is before it cannot be made up.
    named = f"{message.site} {worker}" if message.site else worker
    return named, _whole(message, "incarnation")


def _names(message: Message) -> list[str]:
    """Which vectors come with a message, the center first."""
    names: Any = message.text.get("vectors")
    known = ("center", "average", *RULE_STATE)
    listed = isinstance(names, list) and names[:1] == ["center"]
    if listed and all(name in known for name in names) and len(set(names)) == len(names):
        return list(names)
    raise malformed("vectors", names, f"'center', and some of {', '.join(known[1:])}")


def _saves(message: Message) -> dict[str, str]:
    """Short names and ids of few checkpoints; what they are is not looked at here."""
    saves: Any = message.text.get("saves")
    if isinstance(saves, dict) and len(saves) <= MOST_SAVES:
        words = [*saves, *saves.values()]
        if all(isinstance(word, str) and len(word) <= _LONGEST for word in words):
            return saves
    raise malformed("saves", saves, f"at most {MOST_SAVES} names of checkpoints, with their ids")


def _whole(message: Message, name: str) -> int:
    value = message.text.get(name)
    if type(value) is not int or not 0 <= value < _MOST:
        raise malformed(name, value, f"a whole number from 0 to {_MOST - 1}")
    return value
