"""The thread that talks to a server ends when it is to, whatever it is in the middle of."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
from served import LAYOUT

from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import CenterClient
from lightning_easgd.server.courier import Courier

pytestmark = pytest.mark.timeout(60)


class Reopened:
    """A transport that is closed just before a call, which opens it again; no server answers."""

    def __init__(self) -> None:
        self.called, self.closed = threading.Event(), threading.Event()
        self.under_way, self.ended = False, threading.Event()

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        self.called.set()
        assert self.closed.wait(20)
        self.under_way = True
        assert self.ended.wait(20)
        raise LostError("closed")
        yield b""

    def close(self) -> None:
        if self.under_way:
            self.ended.set()
        self.closed.set()


def test_a_call_that_begins_while_it_ends_is_not_awaited() -> None:
    transport = Reopened()
    courier = Courier(CenterClient(transport, "0", LAYOUT), every=0.0)
    assert transport.called.wait(20)
    courier.close()
    assert transport.ended.is_set()
