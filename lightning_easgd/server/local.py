"""The server of workers on this machine: a process that ends when they have.

It takes its settings as JSON, writes its port, keeps no snapshots, and outlives the worker that
started it. Silent workers may be stopped, as by Ctrl-Z, and come back: it waits for them while that
worker, or another one, is there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time

from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.grpc_transport import GrpcServer
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.memory import keep_memory
from lightning_easgd.server.settings import Settings

_LOOKS = 0.2
"""Seconds between two looks whether somebody is there."""


def main() -> None:
    """Serve until all workers have left, or are silent and nobody needs it any more.

    That is told by SIGTERM, or by the end of whoever started it.
    """
    parent, told = os.getppid(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    keep_memory()
    handler = Handler(CenterServer(Settings.of(**json.loads(sys.argv[1]))))
    server = GrpcServer(handler)
    print(server.port, flush=True)
    came = False
    while True:
        time.sleep(_LOOKS)
        with handler.lock:
            here = bool(handler.server.workers(-math.inf))
            silent = not handler.server.workers(time.monotonic())
        came |= here
        unneeded = told.is_set() or os.getppid() != parent
        if (came and not here) or (silent and unneeded):
            break
    server.close()
