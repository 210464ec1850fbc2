"""What an asynchronous center's server costs beyond gRPC: it against an echo of the same messages.

A process has both on two ports. Workers, which are processes too, send to one and then to the
other, over loopback, for as long. So both meet the same machine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server import CenterServer, Settings
from lightning_easgd.server.client import CenterClient
from lightning_easgd.server.frames import cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.model import bytes_of

WAYS = ("echo", "server")
WARM_UP = 3
LONGEST = 120.0
"""Seconds that anything may take."""


class Echo(Handler):
    """Sends back what comes, as it came."""

    def answer(self, frames: Iterable[bytes], sender: str) -> Iterator[bytes]:
        """The same frames."""
        yield from list(frames)


def server(
    *, workers: int, megabytes: float, encrypted: bool, journal: Any, repetitions: int
) -> None:
    """Measure and print both, in pairs; see scripts/measure.py for the options."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    numel = int(megabytes * 1e6 / 4)
    with tempfile.TemporaryDirectory() as folder:
        shown = _certificates(folder) if encrypted else {"server": None, "worker": None}
        here, there = context.Pipe()
        processes = [context.Process(target=_serve, args=(there, shown["server"], folder, journal))]
        processes[0].start()
        try:
            ports = here.recv()
            go, counts = context.Barrier(workers + 1), context.Queue()
            for worker in range(workers):
                asked = (f"{worker}", ports, shown["worker"], numel, repetitions, go, counts)
                processes.append(context.Process(target=_work, args=asked))
                processes[-1].start()
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for repetition in range(repetitions):
                for way in _order(repetition):
                    found[way].append(_measured(here, go, counts, workers, megabytes))
            here.send(False)
            for process in processes:
                process.join(LONGEST)
        finally:
            for process in processes:
                process.kill()
                process.join()
    way = "encrypted" if encrypted else "plain"
    _print(found, f"{workers} workers, {megabytes:g} MB, {way}, journal {journal}")


def _measured(
    here: Connection, go: Any, counts: Any, workers: int, megabytes: float
) -> dict[str, float]:
    go.wait(LONGEST)
    here.send(True)
    before = here.recv()
    go.wait(LONGEST)
    rates, seconds = zip(*(counts.get(timeout=LONGEST) for _ in range(workers)), strict=True)
    here.send(True)
    spent = here.recv() - before
    exchanges = sum(rate * second for rate, second in zip(rates, seconds, strict=True))
    return {
        "MB/s": sum(rates) * megabytes,
        "processor": 1e3 * spent / exchanges,
        "share": min(rates) / statistics.mean(rates),
    }


def _print(found: dict[str, list[dict[str, float]]], title: str) -> None:
    print(title)
    for way in WAYS:
        middle = {k: statistics.median(each[k] for each in found[way]) for k in found[way][0]}
        print(
            f"  {way:<7} {middle['MB/s']:5.0f} MB/s each way, {middle['processor']:.2f} ms of a"
            f" processor an exchange, the slowest worker at {middle['share']:.2f} of the mean"
        )
    pairs = zip(found["server"], found["echo"], strict=True)
    ratios = sorted(ours["MB/s"] / bare["MB/s"] for ours, bare in pairs)
    print(
        f"  server / echo {statistics.median(ratios):.3f} in the middle of {len(ratios)} pairs,"
        f" from {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


def _order(repetition: int) -> tuple[str, ...]:
    return WAYS if repetition % 2 else WAYS[::-1]


def _certificates(folder: str) -> dict[str, Any]:
    from lightning_easgd.server.keys import make_certificates

    return {name: make_certificates(Path(folder), name) for name in ("server", "worker")}


def _serve(pipe: Connection, certificates: Any, folder: str, journal: Any) -> None:
    from lightning_easgd.server.grpc_transport import GrpcServer
    from lightning_easgd.server.serving import Serving

    served = Path(folder) / "center"
    servers = {
        "echo": GrpcServer(Echo(CenterServer()), certificates=certificates),
        "server": Serving(Settings(), served, journal=journal, certificates=certificates),
    }
    pipe.send({way: each.port for way, each in servers.items()})
    while pipe.recv():
        spent = os.times()
        pipe.send(spent.user + spent.system)
    for each in servers.values():
        each.close()


def _work(
    worker: str,
    ports: dict[str, int],
    certificates: Any,
    numel: int,
    repetitions: int,
    go: Any,
    counts: Any,
) -> None:
    from lightning_easgd.server.grpc_transport import GrpcTransport

    layout = FlatLayout([("weight", torch.empty(numel, device="meta"))])
    difference = FlatVector(layout, {torch.float32: torch.full((numel,), 1e-3)})
    transports = {
        way: GrpcTransport(f"127.0.0.1:{port}", certificates=certificates)
        for way, port in ports.items()
    }
    CenterClient(transports["server"], worker, layout, incarnation=1).join(difference)
    sequence = 0

    def exchange(way: str) -> None:
        nonlocal sequence
        sequence += 1
        text = {"do": "add", "worker": worker, "incarnation": 1, "sequence": sequence}
        message = cut({**text, "fetch": True}, bytes_of(difference))
        came = sum(len(frame) for frame in transports[way].call(message, LONGEST))
        assert came >= 4 * numel, "the server refused"

    for way in WAYS * WARM_UP:
        exchange(way)
    for repetition in range(repetitions):
        for way in _order(repetition):
            go.wait(LONGEST)
            go.wait(LONGEST)
            begun, made = time.perf_counter(), 0
            while (passed := time.perf_counter() - begun) < 1.5:
                exchange(way)
                made += 1
            counts.put((made / passed, passed))
    for transport in transports.values():
        transport.close()
