"""What an asynchronous center's server costs beyond gRPC: it against an echo of the same messages.

Workers, which are processes too, send to one and then to the other, over loopback, for as long. So
all meet the same machine. Each is a process of its own, of which the echo's is as gRPC leaves it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lightning_easgd.center.flat import FlatLayout, FlatVector
from lightning_easgd.server import CenterServer, Settings
from lightning_easgd.server.frames import cut
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.memory import keep_memory
from lightning_easgd.server.model import bytes_of
from lightning_easgd.server.sharded import ShardedClient
from lightning_easgd.server.shards import Shard

WARM_UP = 3
LONGEST = 120.0
"""Seconds that anything may take."""


class Echo(Handler):
    """Sends back what comes, as it came."""

    def answer(self, frames: Iterable[bytes], sender: str, site: str = "") -> Iterator[bytes]:
        """The same frames."""
        yield from list(frames)


def server(
    *,
    workers: int,
    megabytes: float,
    encrypted: bool,
    journal: Any,
    shards: int,
    standby: bool,
    repetitions: int,
) -> None:
    """Measure and print all ways in turn; see scripts/measure.py for the options."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        shown = _certificates(folder) if encrypted else {"server": None, "worker": None}
        serve = partial(_serving, Path(folder), journal, shown["server"])
        try:
            pipes: list[Connection] = []
            ways = {
                "echo": _start(context, processes, pipes, [partial(_echo, shown["server"])]),
                "server": _start(context, processes, pipes, [serve]),
            }
            if shards > 1:
                ways["shards"] = []
                for shard in range(shards):
                    settings = {"shard": shard, "shards": shards}
                    one = [partial(serve, f"shard-{shard}", **settings)]
                    ways["shards"] += _start(context, processes, pipes, one)
            if standby:
                ways["standby"] = _start(context, processes, pipes, [partial(serve, "primary")])
                of = f"127.0.0.1:{ways['standby'][0]}"
                one = [partial(serve, "standby", standby_of=of)]
                _start(context, processes, pipes, one)
            go, counts = context.Barrier(workers + 1), context.Queue()
            numel = int(megabytes * 1e6 / 4)
            for worker in range(workers):
                asked = (f"{worker}", ways, shown["worker"], numel, repetitions, go, counts)
                processes.append(context.Process(target=_work, args=asked))
                processes[-1].start()
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for repetition in range(repetitions):
                for way in _order(ways, repetition):
                    found[way].append(_measured(pipes, go, counts, workers, megabytes))
            if standby:
                _require_in_step(Path(folder) / "primary")
            for pipe in pipes:
                pipe.send(False)
            for process in processes:
                process.join(LONGEST)
        finally:
            for process in processes:
                process.kill()
                process.join()
    way = "encrypted" if encrypted else "plain"
    _print(found, f"{workers} workers, {megabytes:g} MB, {way}, journal {journal}")


def _start(
    context: Any, processes: list[Any], pipes: list[Connection], makers: list[Any]
) -> list[int]:
    """Start a process with servers; their ports."""
    here, there = context.Pipe()
    processes.append(context.Process(target=_serve, args=(there, makers)))
    processes[-1].start()
    pipes.append(here)
    ports: list[int] = here.recv()
    return ports


def _measured(
    pipes: list[Connection], go: Any, counts: Any, workers: int, megabytes: float
) -> dict[str, float]:
    go.wait(LONGEST)
    before = _spent(pipes)
    go.wait(LONGEST)
    rates, seconds = zip(*(counts.get(timeout=LONGEST) for _ in range(workers)), strict=True)
    spent = _spent(pipes) - before
    exchanges = sum(rate * second for rate, second in zip(rates, seconds, strict=True))
    return {
        "MB/s": sum(rates) * megabytes,
        "processor": 1e3 * spent / exchanges,
        "share": min(rates) / statistics.mean(rates),
    }


def _spent(pipes: list[Connection]) -> float:
    """Seconds of a processor that all servers took so far."""
    for pipe in pipes:
        pipe.send(True)
    return sum(pipe.recv() for pipe in pipes)


def _require_in_step(primary: Path) -> None:
    assert json.loads((primary / "standing.json").read_text())["standby"], "it never followed"


def _print(found: dict[str, list[dict[str, float]]], title: str) -> None:
    print(title)
    for way in found:
        middle = {k: statistics.median(each[k] for each in found[way]) for k in found[way][0]}
        print(
            f"  {way:<7} {middle['MB/s']:5.0f} MB/s each way, {middle['processor']:.2f} ms of a"
            f" processor an exchange, the slowest worker at {middle['share']:.2f} of the mean"
        )
    for way in list(found)[1:]:
        to = "echo" if way == "server" else "server"
        pairs = zip(found[way], found[to], strict=True)
        ratios = sorted(ours["MB/s"] / bare["MB/s"] for ours, bare in pairs)
        print(
            f"  {way} / {to} {statistics.median(ratios):.3f} in the middle of {len(ratios)} pairs,"
            f" from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )


def _order(ways: Iterable[str], repetition: int) -> list[str]:
    return list(ways) if repetition % 2 else list(ways)[::-1]


def _certificates(folder: str) -> dict[str, Any]:
    from lightning_easgd.server.keys import make_certificates

    return {name: make_certificates(Path(folder), name) for name in ("server", "worker")}


def _serve(pipe: Connection, makers: list[Any]) -> None:
    servers = [make() for make in makers]
    pipe.send([each.port for each in servers])
    while pipe.recv():
        spent = os.times()
        pipe.send(spent.user + spent.system)
    for each in servers[::-1]:
        each.close()


def _echo(certificates: Any) -> Any:
    from lightning_easgd.server.grpc_transport import GrpcServer

    return GrpcServer(Echo(CenterServer()), certificates=certificates)


def _serving(
    folder: Path,
    journal: Any,
    certificates: Any,
    name: str = "center",
    standby_of: str | None = None,
    **settings: Any,
) -> Any:
    from lightning_easgd.server.serving import Pairing, Serving

    keep_memory()  # as serve.py does
    return Serving(
        Settings(**settings),
        folder / name,
        journal=journal,
        pairing=Pairing(standby_of),
        certificates=certificates,
    )


def _work(
    worker: str,
    ways: dict[str, list[int]],
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
        way: [GrpcTransport(f"127.0.0.1:{port}", certificates=certificates) for port in ports]
        for way, ports in ways.items()
    }
    for way in list(ways)[1:]:
        reach = transports[way].__getitem__
        ShardedClient(reach, worker, layout, incarnation=1).join(difference)
    sequence = 0

    def ask(transport: GrpcTransport, part: FlatVector) -> None:
        text = {"do": "add", "worker": worker, "incarnation": 1, "sequence": sequence}
        message = cut({**text, "fetch": True}, bytes_of(part))
        came = sum(len(frame) for frame in transport.call(message, LONGEST))
        assert came >= sum(part.nbytes for part in part.parts), "the server refused"

    def exchange(way: str) -> None:
        nonlocal sequence
        sequence += 1
        slices = [Shard(number, len(ways[way])) for number in range(len(ways[way]))]
        parts = [each.slice_of(difference, each.layout(layout)) for each in slices]
        list(threads.map(ask, transports[way], parts))

    threads = ThreadPoolExecutor(max(map(len, ways.values())))
    for way in list(ways) * WARM_UP:
        exchange(way)
    for repetition in range(repetitions):
        for way in _order(ways, repetition):
            go.wait(LONGEST)
            go.wait(LONGEST)
            begun, made = time.perf_counter(), 0
            while (passed := time.perf_counter() - begun) < 1.5:
                exchange(way)
                made += 1
            counts.put((made / passed, passed))
    threads.shutdown()
    for transport in chain(*transports.values()):
        transport.close()
