"""How the workers of a ring find and reach each other, or agree that they do without one.

[Note: addresses] A worker cannot know under which of its addresses the next one is reached; a
machine may even call itself 127.0.1.1. So it listens on those that are likely and tells all, and
who connects shows a token that only the right listener answers. Where one of the connections does
not come about (a firewall, say), all workers learn it, and their sums go the way that torch's
process groups have found.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from lightning_easgd.communication.ring import Ring

_ANSWER = b"+"
_KNOCK_SECONDS = 5.0
_SIOCGIFADDR = 0x8915
_TOKEN_BYTES = 16
_OUTSIDE = "192.0.2.1"
"""An address of nobody's (RFC 5737); the way there is the default route."""
_DISCARD = 9

Address = tuple[str, int]


def make_ring(
    rank: int, size: int, gather: Callable[[Any], list[Any]], patience: float
) -> Ring | None:
    """Connect this worker to its neighbours; all workers of the ring must do it.

    Args:
        rank: its number in the ring.
        size: how many workers there are, from 2 on.
        gather: gives a small picklable value of every worker of the ring, in the order of ranks.
        patience: seconds within which neighbours are reached, or are not.

    Returns:
        None, on all of them, if one cannot reach the next.
    """
    if not all(gather(sys.platform == "linux")):  # elsewhere threads cannot be woken so late
        return None
    with ExitStack() as connections:
        with ExitStack() as doors:
            listeners = [doors.enter_context(each) for each in _listen(own_addresses())]
            token = secrets.token_bytes(_TOKEN_BYTES)
            everybody = gather((token, [each.getsockname()[:2] for each in listeners]))
            deadline = time.monotonic() + patience
            entrance = _Entrance(listeners, token, deadline)
            to_next = _connect(everybody[(rank + 1) % size], deadline)
            from_previous = entrance.wait()
        for connection in (to_next, from_previous):
            if connection is not None:
                connections.enter_context(connection)
        if not all(gather(to_next is not None and from_previous is not None)):
            return None
        connections.pop_all()
    assert to_next is not None
    assert from_previous is not None
    return Ring(rank, size, to_next, from_previous)


def own_addresses() -> list[str]:
    """Addresses under which other workers may reach this one, the likeliest first.

    That of the interface which GLOO_SOCKET_IFNAME names; else that from which this machine reaches
    MASTER_ADDR and, since this may be its own name for itself, that from which it reaches others.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        address = address_of_interface(chosen)
        return [] if address is None else [address]
    found = []
    for host in (os.environ.get("MASTER_ADDR"), _OUTSIDE):
        with suppress(OSError):
            found.append(address_towards(host or _OUTSIDE))
    return list(dict.fromkeys(found))


def address_towards(host: str) -> str:
    """The address from which this machine reaches another.

    Raises:
        OSError: there is no way to it.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def address_of_interface(name: str) -> str | None:
    """The IPv4 address of a network interface on Linux; None if it has none."""
    import fcntl  # there is none on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = name.encode()[:15].ljust(256, b"\0")
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


class _Entrance:
    """Waits beside this thread for a connection that shows a token."""

    def __init__(self, listeners: Sequence[socket.socket], token: bytes, deadline: float) -> None:
        self._listeners = listeners
        self._token = token
        self._deadline = deadline
        self._accepted: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="easgd-entrance", daemon=True)
        self._thread.start()

    def wait(self) -> socket.socket | None:
        """The connection, if it came in time."""
        self._thread.join()
        return self._accepted

    def _run(self) -> None:
        with suppress(OSError), selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while self._accepted is None and (left := self._deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    connection, _ = key.fileobj.accept()
                    if self._knows(connection):
                        self._accepted = connection
                        return
                    connection.close()

    def _knows(self, connection: socket.socket) -> bool:
        connection.settimeout(_KNOCK_SECONDS)
        try:
            if connection.recv(_TOKEN_BYTES, socket.MSG_WAITALL) != self._token:
                return False
            connection.sendall(_ANSWER)
        except OSError:
            return False
        return True


def _listen(addresses: Sequence[str]) -> list[socket.socket]:
    listeners = []
    for address in addresses:
        with suppress(OSError):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listeners.append(socket.create_server((address, 0), family=family))
    return listeners


def _connect(door: tuple[bytes, Sequence[Address]], deadline: float) -> socket.socket | None:
    """A connection to the worker that knows a token, under the first of its addresses that has it.

    Args:
        door: the token and the addresses.
        deadline: of it all.
    """
    token, addresses = door
    for address in addresses:
        with suppress(OSError), ExitStack() as stack:
            left = max(0.1, deadline - time.monotonic())
            connection = socket.create_connection(address, min(_KNOCK_SECONDS, left))
            stack.callback(connection.close)
            connection.sendall(token)
            if connection.recv(len(_ANSWER)) == _ANSWER:
                stack.pop_all()
                return connection
    return None
