"""Answers the messages of workers, however they come; one at a time asks the center."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_easgd.center.flat import FlatLayout
from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.frames import Message, cut
from lightning_easgd.server.model import byte_size, bytes_of, layout_of, vector_on
from lightning_easgd.server.refusal import Refusal, Refused

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\x21-\x7e]{1,64}")
_MOST = 2**63

_KEPT = 4

Answer = list[bytes]
"""Frames, made while the server is not asked by another."""


class Handler:
    """Turns messages into calls of a server, and what it says into messages.

    Whatever comes in, it never raises, and a message that is none leaves the center as it was.

    Args:
        server: is asked by one thread at a time.
        clock: gives seconds.

    Attributes:
        lock: held while the server is asked.
        refused: how often each sender was refused, by reason.
    """

    def __init__(self, server: CenterServer, clock: Callable[[], float] = time.monotonic) -> None:
        self.server = server
        self.lock = threading.Lock()
        self.refused: Counter[tuple[str, Refusal]] = Counter()
        self._clock = clock
        self._free: deque[Tensor] = deque(maxlen=_KEPT)
        """Memory of differences, which took as long to get as to fill."""
        self._operations: dict[Any, Callable[[Message], Answer]] = {
            "join": self._join,
            "get": self._get,
            "add": self._add,
            "leave": self._leave,
        }

    def answer(self, frames: Iterable[bytes], sender: str) -> Iterator[bytes]:
        """The frames of the answer to a message.

        Args:
            frames: of the message. What they raise goes on to the caller.
            sender: for the log.
        """
        try:
            message = Message(frames)
            operation = message.text.get("do")
            if not isinstance(operation, str) or operation not in self._operations:
                raise _malformed("do", operation, ", ".join(map(repr, self._operations)))
            answer = self._operations[operation](message)
        except Refused as refused:
            self._note(sender, refused)
            answer = list(cut({"refused": refused.reason.value, "message": str(refused)}))
        yield from answer

    def _note(self, sender: str, refused: Refused) -> None:
        """Log the first refusal of a sender for a reason, and then ever fewer."""
        with self.lock:
            if len(self.refused) > 10_000:  # a sender may have many addresses
                self.refused.clear()
            self.refused[sender, refused.reason] += 1
            times = self.refused[sender, refused.reason]
        if refused.reason.ends and times & (times - 1) == 0:
            log.warning("%s was refused for the %d. time: %s", sender, times, refused)

    def _join(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        model = layout_of(message.text.get("model"), self.server.settings.limits.model_bytes)
        weights = None
        if message.payload_bytes and not self.server.has_center:
            weights = vector_on(model, message.payload(byte_size(model)))
        with self.lock:
            terms = self.server.join(worker, incarnation, model, now=self._clock(), weights=weights)
        return list(cut(asdict(terms)))

    def _get(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        message.payload(0)
        with self.lock:
            now = self._clock()
            version, center = self.server.get(worker, incarnation, now=now)
            said = {"version": version, "alpha": self.server.alpha(now)}
            return list(cut(said, bytes_of(center)))

    def _add(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        sequence = _whole(message, "sequence")
        fetch = message.text.get("fetch", False) is True
        samples = message.text.get("samples", 1.0)
        if type(samples) not in (int, float) or not 0 < samples < _MOST:
            raise _malformed("samples", samples, "a positive number")
        layout = self.server.layout
        memory = message.payload(byte_size(layout), self._memory(layout))
        given = (worker, incarnation, sequence, vector_on(layout, memory))
        with self.lock:
            now = self._clock()
            center: list[memoryview] = []
            if fetch:
                receipt, vector = self.server.exchange(*given, now=now, samples=samples)
                center = bytes_of(vector)
            else:
                receipt = self.server.add(*given, now=now, samples=samples)
            answer = list(cut({**asdict(receipt), "alpha": self.server.alpha(now)}, center))
        self._free.append(memory)
        return answer

    def _memory(self, layout: FlatLayout) -> Tensor | None:
        """Memory that a difference had before, if it has the size."""
        try:
            memory = self._free.pop()
        except IndexError:
            return None
        return memory if memory.numel() == byte_size(layout) else None

    def _leave(self, message: Message) -> Answer:
        worker, incarnation = _sender(message)
        message.payload(0)
        with self.lock:
            self.server.leave(worker, incarnation, now=self._clock())
        return list(cut({}))


def _sender(message: Message) -> tuple[str, int]:
    worker = message.text.get("worker")
    if not isinstance(worker, str) or not _NAME.fullmatch(worker):
        raise _malformed("worker", worker, "a name of 1 to 64 visible ASCII characters")
    return worker, _whole(message, "incarnation")


def _whole(message: Message, name: str) -> int:
    value = message.text.get(name)
    if type(value) is not int or not 0 <= value < _MOST:
        raise _malformed(name, value, f"a whole number from 0 to {_MOST - 1}")
    return value


def _malformed(name: str, value: object, allowed: str) -> Refused:
    shown = repr(value)
    return Refused(Refusal.MALFORMED, f"{name}={shown:.80} is not allowed. Allowed: {allowed}.")
