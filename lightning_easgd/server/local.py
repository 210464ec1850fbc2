"""The server of workers on this machine: a process that ends when they have.

It takes its settings as JSON, writes its port, keeps no snapshots, and outlives the worker that
started it.
"""

from __future__ import annotations

import json
import os
import sys
import time

from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.grpc_transport import GrpcServer
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.settings import Settings

_LOOKS = 0.2
"""Seconds between two looks whether somebody is there."""


def main() -> None:
    """Serve until the last worker has left, or whoever started it before the first one came."""
    parent = os.getppid()
    handler = Handler(CenterServer(Settings.of(**json.loads(sys.argv[1]))))
    server = GrpcServer(handler)
    print(server.port, flush=True)
    came = False
    while True:
        time.sleep(_LOOKS)
        with handler.lock:
            there = bool(handler.server.workers(time.monotonic()))
        if not there and (came or os.getppid() != parent):
            break
        came |= there
    server.close()
