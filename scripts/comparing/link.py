"""What a link between two hosts really carries, by a transfer."""

from __future__ import annotations

import socket
import time

_PART = 1 << 16
_MOST_BYTES = 1 << 26
_PATIENCE_SECONDS = 30.0


def receive(port: int) -> float:
    """Bits per second of what one sender sends here.

    Args:
        port: where to listen.
    """
    with socket.create_server(("", port)) as server:
        server.settimeout(_PATIENCE_SECONDS)
        with server.accept()[0] as link:
            link.settimeout(_PATIENCE_SECONDS)
            link.recv(_PART)  # what queues let through at once is not counted
            began, received = time.perf_counter(), 0
            while got := len(link.recv(_PART)):
                received += got
            return 8 * received / (time.perf_counter() - began)


def send(host: str, port: int, seconds: float = 1.0) -> None:
    """Send for some time, or 64 MiB, to who receives there."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            link = socket.create_connection((host, port), timeout=_PATIENCE_SECONDS)
            break
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    with link:
        end, left, part = time.monotonic() + seconds, _MOST_BYTES, bytes(_PART)
        while left > 0 and time.monotonic() < end:
            link.sendall(part)
            left -= len(part)
