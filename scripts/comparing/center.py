"""Where the center of an asynchronous contender is: at a server that worker 0 starts."""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from parting import end_with

from lightning_easgd import CenterAt, EASGDStrategy
from lightning_easgd.communication import ExchangeError, share

PATIENCE = timedelta(minutes=2)
"""How long others wait for worker 0, and it for them."""

_STARTING = 60.0
"""Seconds in which a server starts."""


def asynchronous(
    *, algorithm: str, tau: int, beta: float | None = None, **options: Any
) -> EASGDStrategy:
    """A worker at its own pace.

    The server is on this machine where all workers are, else on worker 0's: of the network it takes
    the others' differences, and not worker 0's.

    Args:
        algorithm: of the strategy and the server, as what follows.
        tau: likewise.
        beta: likewise; None: its default.
        **options: of the strategy alone.

    Raises:
        ExchangeError: the server did not start, or worker 0 did not say where it is.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):  # also of who only looks at it
        return EASGDStrategy(algorithm=algorithm, tau=tau, beta=beta, center="local", **options)
    settings = {"algorithm": algorithm, "tau": tau, "workers": size}
    settings |= {} if beta is None else {"beta": beta}
    port = told_by_worker_0(lambda: _serve(settings))
    center = CenterAt(f"{os.environ['MASTER_ADDR']}:{port}", insecure=True)
    return EASGDStrategy(algorithm=algorithm, tau=tau, center=center, **options)


def is_apart(strategy: Strategy) -> bool:
    """Whether its workers wait for nobody."""
    return isinstance(strategy, EASGDStrategy) and strategy.solo


def told_by_worker_0(find: Callable[[], str]) -> str:
    """What worker 0 finds, on all; they must call it equally often, before they train.

    Raises:
        ExchangeError: it did not come.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return share(None if rank else find(), rank=rank, size=size, timeout=PATIENCE)


def _serve(settings: Mapping[str, Any]) -> str:
    """The port of a server in a process of its own, which ends with this one."""
    parent = os.getpid()
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reads)
            end_with(parent, signal.SIGKILL)
            _be_server(writes, settings)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as told:
        port = told.read() if select.select([told], [], [], _STARTING)[0] else ""
    if not port:
        raise ExchangeError(
            "The server of the center did not start. Its error is above, or it took more than"
            f" {_STARTING:g} s."
        )
    return port


def _be_server(writes: int, settings: Mapping[str, Any]) -> None:
    from lightning_easgd.server import CenterServer, Settings
    from lightning_easgd.server.grpc_transport import GrpcServer
    from lightning_easgd.server.handler import Handler

    torch.set_num_threads(1)  # those of OpenMP are not in a fork
    handler = Handler(CenterServer(Settings(**settings)))
    server = GrpcServer(handler, "0.0.0.0:0", insecure=True)
    with os.fdopen(writes, "w") as told:
        told.write(str(server.port))
    while True:
        signal.pause()
