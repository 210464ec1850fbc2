"""One table that every transport passes, and what gRPC adds: addresses, deadlines, certificates."""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from served import LAYOUT, constant, random_vector, values

from lightning_easgd.center.flat import FlatLayout
from lightning_easgd.server import CenterServer, Limits, Refusal, Refused, Settings
from lightning_easgd.server import frames as frames_module
from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import (
    CenterClient,
    InMemory,
    PendingError,
    Transport,
    UnreachableError,
)
from lightning_easgd.server.frames import FRAME_BYTES, cut
from lightning_easgd.server.handler import Handler

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
import grpc

from lightning_easgd.server import grpc_transport, keys
from lightning_easgd.server.certificates import Certificates
from lightning_easgd.server.grpc_transport import GrpcServer, GrpcTransport
from lightning_easgd.server.keys import make_certificates

pytestmark = pytest.mark.timeout(60)


class Served(NamedTuple):
    """A server, and how to reach it."""

    handler: Handler
    transport: Callable[[], Transport]

    @property
    def center(self) -> np.ndarray:
        return values(self.handler.server.delivered())

    def client(self, worker: str = "0", model: FlatLayout = LAYOUT, **options: Any) -> CenterClient:
        return CenterClient(self.transport(), worker, model, **{"patience": 5.0, **options})

    def joined(self, worker: str = "0", **options: Any) -> CenterClient:
        client = self.client(worker, **options)
        client.join(constant(0.0, options.get("model", LAYOUT)))
        return client


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority")
    for name in ("server", "site-a"):
        make_certificates(folder, name)
    return folder


def certificates(authority: Path, name: str) -> Certificates:
    names = ("authority.pem", f"{name}.pem", f"{name}.key")
    return Certificates(*(authority / each for each in names))


TRANSPORTS = ["memory", "plain", "encrypted"]


@pytest.fixture(params=TRANSPORTS)
def serve(
    request: pytest.FixtureRequest, authority: Path
) -> Iterator[Callable[[Settings], Served]]:
    """Starts servers that are reached by one of the transports."""
    ends: list[Any] = []

    def start(settings: Settings) -> Served:
        handler = Handler(CenterServer(settings))
        if request.param == "memory":
            return Served(handler, lambda: InMemory(handler))
        shown, theirs = None, None
        if request.param == "encrypted":
            shown, theirs = (certificates(authority, name) for name in ("server", "site-a"))
        server = GrpcServer(handler, certificates=shown)
        ends.append(server)
        address = f"127.0.0.1:{server.port}"

        def transport() -> Transport:
            made = GrpcTransport(address, certificates=theirs)
            ends.append(made)
            return made

        return Served(handler, transport)

    yield start
    for end in reversed(ends):
        end.close()


Serve = Callable[[Settings], Served]


# Every transport


def test_a_worker_joins_exchanges_and_leaves(serve: Serve) -> None:
    served = serve(Settings(workers=2, beta=0.8, tau=7))
    client, start = served.client(), random_vector(0)
    terms = client.join(start)
    assert (terms.algorithm, terms.tau, terms.alpha, terms.has_center) == ("easgd", 7, 0.4, True)
    version, center = client.get()
    assert version == 0
    np.testing.assert_array_equal(values(center), values(start))
    d = random_vector(1)
    receipt, nothing = client.add(d)
    assert (receipt.version, receipt.staleness, receipt.weight, nothing) == (1, 0, 1.0, None)
    receipt, center_then = client.add(d, fetch=True)
    start.parts[0].add_(d.parts[0]).add_(d.parts[0])
    start.parts[1].add_(d.parts[1]).add_(d.parts[1])
    assert center_then is not None
    np.testing.assert_array_equal(values(center_then), values(start))
    client.leave()
    with pytest.raises(Refused):
        served.handler.server.get("0", 0, now=0)
    assert not served.handler.server.workers(0)


def test_four_threads_lose_nothing_and_add_nothing_twice(serve: Serve) -> None:
    """Whole numbers, whose sum does not depend on the order."""
    served = serve(Settings())
    first = served.joined("first")

    def work(worker: int) -> None:
        client = served.joined(f"{worker}")
        for _ in range(25):
            client.add(constant(2.0**worker), fetch=worker % 2 == 0)
        client.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    np.testing.assert_array_equal(served.center, 25 * 15)
    assert first.get()[0] == 100


def test_a_model_is_larger_than_a_message(serve: Serve) -> None:
    wide = FlatLayout([("w", torch.empty(3 * FRAME_BYTES // 4 + 5))])
    served = serve(Settings())
    client = served.joined(model=wide)
    d = random_vector(0, wide)
    _, center = client.add(d, fetch=True)
    assert center is not None
    assert torch.equal(center.parts[0], d.parts[0])


def test_many_parameters_are_described(serve: Serve) -> None:
    """By a text that takes several frames."""
    many = FlatLayout((f"layer.{i}.{'x' * 1000}", torch.empty(1)) for i in range(3_000))
    served = serve(Settings())
    assert served.joined(model=many).get()[1].parts[0].numel() == 3_000
    other = FlatLayout((f"layer.{i}.{'x' * 1000}", torch.empty(1)) for i in range(2_999))
    with pytest.raises(Refused, match=r"only the server has 'layer\.2999"):
        served.client("1", other).join(constant(0.0, other))


@pytest.mark.parametrize("settings", [Settings(), Settings(algorithm="downpour", max_norm=9.0)])
def test_refusals_arrive_with_their_words(serve: Serve, settings: Settings) -> None:
    served = serve(settings)
    client = served.joined(incarnation=5)
    with pytest.raises(Refused, match="values that are not finite") as refused:
        client.add(constant(float("nan")))
    assert refused.value.reason is Refusal.NOT_FINITE
    assert client.add(constant(1e-3))[0].sequence == 1  # the next one counts
    other = FlatLayout([("weight", torch.empty(31, 21))])
    with pytest.raises(Refused, match="'weight', has the shape"):
        served.client("1", other).join(constant(0.0, other))
    with pytest.raises(Refused, match=r"A later process has joined as worker '(site-a )?0'"):
        served.joined(incarnation=4)
    with pytest.raises(Refused, match="a name of 1 to 64 visible ASCII characters"):
        served.joined("a b")


def test_a_worker_waits_for_its_turn(serve: Serve) -> None:
    served = serve(Settings(workers=2, order="round_robin"))
    clients, trace = [served.joined(f"{worker}") for worker in range(2)], []

    def work(worker: int) -> None:
        for _ in range(3):
            version, _ = clients[worker].get()
            trace.append((worker, version))
            clients[worker].add(constant(1.0))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert trace == [(turn % 2, turn) for turn in range(6)]


# The client, whatever happens to its messages


class Unlucky:
    """Loses what is sent or what comes back, and brings copies of old messages again."""

    def __init__(self, handler: Handler, luck: random.Random) -> None:
        self.handler, self.luck = handler, luck
        self.old: list[list[bytes]] = []

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        message = list(frames)
        self.old.append(message)
        fate = self.luck.random()
        if fate < 0.2:
            raise LostError("on the way")
        answer = list(self.handler.answer(message, "unlucky"))
        if fate < 0.4:
            list(self.handler.answer(self.luck.choice(self.old), "late"))
        if fate < 0.6:
            raise LostError("on the way back")
        if fate < 0.7:
            answer = answer[:-1] or [b"EASG"]
        return iter(answer)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(10))
def test_every_difference_arrives_once(seed: int) -> None:
    luck, handler = random.Random(seed), Handler(CenterServer(Settings()))
    clients = [
        CenterClient(Unlucky(handler, luck), f"{i}", LAYOUT, sleep=lambda s: None) for i in range(2)
    ]
    for client in clients:
        client.join(constant(0.0))
    total = 0.0
    for _ in range(40):
        value = float(2 ** luck.randrange(10))
        receipt, _ = luck.choice(clients).add(constant(value), fetch=luck.random() < 0.5)
        total += value
        assert receipt.weight == 1.0
        np.testing.assert_array_equal(values(handler.server.delivered()), total)
    assert sum(client.attempts for client in clients) > 100


def test_who_gives_up_keeps_the_difference_until_it_has_the_receipt() -> None:
    handler, now = Handler(CenterServer(Settings())), [0.0]
    transport = Unlucky(handler, random.Random(0))
    options = {"clock": lambda: now[0], "sleep": lambda s: now.__setitem__(0, now[0] + s)}
    client = CenterClient(transport, "0", LAYOUT, patience=10, **options)
    client.join(constant(0.0))
    for lost_on_the_way_back in (False, True):
        before = handler.server.version

        def lost(
            frames: Iterable[bytes], deadline: float, back: bool = lost_on_the_way_back
        ) -> Iterator[bytes]:
            if back:
                list(handler.answer(frames, ""))
            raise LostError("lost")

        client._transport = type("Lost", (), {"call": staticmethod(lost)})()
        with pytest.raises(UnreachableError, match="No server answered worker '0' within 10 s"):
            client.add(constant(1.0))
        assert client.pending
        with pytest.raises(PendingError, match="call resend"):
            client.add(constant(2.0))
        client._transport = InMemory(handler)
        assert client.resend()[0].version == before + 1
        assert not client.pending
    np.testing.assert_array_equal(values(handler.server.delivered()), 2.0)


def test_a_server_that_was_restored_from_before_it_knew_the_worker_is_joined_again() -> None:
    handler = Handler(CenterServer(Settings()))
    first, second = (CenterClient(InMemory(handler), name, LAYOUT) for name in "ab")
    first.join(constant(1.0))
    snapshot = handler.server.snapshot()
    second.join(constant(0.0))
    second.add(constant(1.0))
    handler.server.restore(snapshot, now=0)
    assert second.add(constant(2.0))[0].sequence == 2
    np.testing.assert_array_equal(values(handler.server.delivered()), 3.0)
    handler.server = CenterServer(Settings())
    with pytest.raises(Refused, match="restarted without its center"):
        second.add(constant(2.0))


class Link(InMemory):
    """Takes the given seconds for each kind of call, and is cut off when time is over."""

    def __init__(self, **takes: float) -> None:
        super().__init__(Handler(CenterServer(Settings())))
        self.takes, self.now = takes, 0.0
        self.away = 0
        self.deadlines: list[tuple[str, float]] = []

    def client(self) -> CenterClient:
        client = CenterClient(self, "0", LAYOUT, clock=lambda: self.now, sleep=self.pass_time)
        client.join(constant(0.0))
        return client

    def of(self, kind: str) -> list[float]:
        """The deadlines of these calls."""
        return [deadline for each, deadline in self.deadlines if each == kind]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        message = list(frames)
        kind = re.findall(rb'"do":"(\w+)"', message[0])[0].decode()
        self.deadlines.append((kind, deadline))
        if self.away:
            self.away -= 1
            raise LostError("nobody listens")
        self.pass_time(min(self.takes.get(kind, 0.0), deadline))
        if self.takes.get(kind, 0.0) > deadline:
            raise LostError("time is over")
        return super().call(message, deadline)


def beat(client: CenterClient) -> None:
    client.beat(team=1, progress=0, finished=False, stops=False, saves={})


def test_deadlines_follow_what_calls_of_a_kind_took() -> None:
    link = Link(beat=0.01, get=1.0, add=8.0)
    client = link.client()
    for _ in range(40):  # more signs of life than differences, as while training goes on
        for _ in range(5):
            beat(client)
        client.get()
        client.add(constant(1.0))
    asked = len(link.deadlines)
    assert client.attempts == asked == 40 * 7 + 2  # none was lost
    last = {"join": 60, "beat": 5, "get": 10, "add": 80}
    assert dict(link.deadlines) == pytest.approx(last)
    assert link.of("add")[:5] == pytest.approx([60, 80, 80, 80, 80])


def test_a_call_has_more_time_after_each_that_was_too_short() -> None:
    link = Link(add=0.2)
    client = link.client()
    for _ in range(40):
        client.add(constant(1.0))
    link.takes["add"] = 30.0  # from now on the link is slow
    attempts = client.attempts
    client.patience = 300
    for _ in range(10):
        beat(client)
        client.add(constant(1.0))
    assert link.of("add")[40:44] == pytest.approx([5, 20, 80, 300])
    assert client.attempts == attempts + 2 + 2 * 10
    np.testing.assert_array_equal(values(client.get()[1]), 50.0)


def test_a_first_message_that_takes_longer_than_any_before_arrives() -> None:
    link = Link(add=200.0)
    client = link.client()
    client.patience = 300
    assert client.add(constant(1.0))[0].version == 1
    assert link.of("add") == [60, 240]


def test_a_server_that_is_away_for_a_moment_changes_no_deadline() -> None:
    link = Link()
    client = link.client()
    link.away = 3
    client.add(constant(1.0))
    assert link.of("add") == [60] * 4


def test_a_worker_whose_message_takes_longer_than_the_lease_is_there_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames_module, "FRAME_BYTES", 64)
    now = [0.0]
    handler = Handler(CenterServer(Settings(lease=10.0)), clock=lambda: now[0])
    client = CenterClient(InMemory(handler), "0", LAYOUT)
    client.join(constant(0.0))
    there = []

    def slowly(frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            yield frame
            now[0] += 2.0
            there.append(list(handler.server.workers(now[0])))

    def call(frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        return slowly(handler.answer(slowly(frames), "slow"))

    client._transport.call = call
    client.add(constant(1.0), fetch=True)
    assert len(there) > 60
    assert there == [["0"]] * len(there)
    now[0] += 10.1
    assert not handler.server.workers(now[0])


# gRPC


@pytest.fixture
def handler() -> Handler:
    return Handler(CenterServer(Settings(limits=Limits(most_workers=4))))


@pytest.fixture
def server(handler: Handler) -> Iterator[GrpcServer]:
    started = GrpcServer(handler)
    yield started
    started.close()


def test_the_next_address_is_asked_when_a_server_is_gone(handler: Handler) -> None:
    servers = [GrpcServer(handler), GrpcServer(handler)]
    transport = GrpcTransport([f"127.0.0.1:{server.port}" for server in servers])
    client = CenterClient(transport, "0", LAYOUT, patience=20)
    client.join(constant(0.0))
    servers[0].close(0)
    assert client.add(constant(1.0))[0].version == 1
    again = GrpcServer(handler, f"127.0.0.1:{servers[0].port}")
    servers[1].close(0)
    assert client.add(constant(1.0))[0].version == 2
    client.close()
    again.close()


def test_nobody_answers(server: GrpcServer) -> None:
    server.close()
    transport = GrpcTransport(f"127.0.0.1:{server.port}")
    client = CenterClient(transport, "0", LAYOUT, patience=0.2)
    with pytest.raises(UnreachableError, match=rf"127\.0\.0\.1:{server.port}: unavailable"):
        client.join(constant(0.0))
    client.close()


def raw(port: int, frames: Iterable[bytes], **options: Any) -> list[bytes]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.stream_stream("/lightning_easgd.Center/ask")
        return list(ask(iter(frames), **options))


def test_a_call_that_may_take_for_ever_is_refused(server: GrpcServer) -> None:
    for options in ({}, {"timeout": 10_000}):
        with pytest.raises(grpc.RpcError) as refused:
            raw(server.port, cut({"do": "get"}), **options)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_sender_that_never_ends_is_cut_off_at_its_deadline(
    server: GrpcServer, handler: Handler
) -> None:
    free = threading.Event()

    def endless() -> Iterator[bytes]:
        yield b"EASG"
        free.wait(20)

    with pytest.raises(grpc.RpcError) as ended:
        raw(server.port, endless(), timeout=0.5)
    free.set()
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    client = CenterClient(GrpcTransport(f"127.0.0.1:{server.port}"), "0", LAYOUT)
    client.join(constant(0.0))
    client.close()


def test_calls_that_are_given_up_leave_room_for_others(server: GrpcServer) -> None:
    free = threading.Event()

    def endless() -> Iterator[bytes]:
        yield b"EASG"
        free.wait(20)

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        ask = channel.stream_stream("/lightning_easgd.Center/ask")
        calls = [ask(endless(), timeout=30) for _ in range(grpc_transport.AT_ONCE + 3)]
        for call in calls:
            call.cancel()
        free.set()
    client = CenterClient(GrpcTransport(f"127.0.0.1:{server.port}"), "0", LAYOUT)
    client.join(constant(0.0))
    client.close()


def test_a_frame_that_is_too_large_ends_its_call_only(server: GrpcServer, handler: Handler) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        raw(server.port, [bytes(FRAME_BYTES + 1)], timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raw(server.port, [b"no message"], timeout=10)[0][18:].startswith(b'{"refused":"malf')


def test_a_port_has_one_server(server: GrpcServer, handler: Handler) -> None:
    with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1:{server.port}"):
        GrpcServer(handler, f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "example.org:5700", "10.0.0.1:5700"])
def test_another_address_needs_certificates_or_courage(handler: Handler, address: str) -> None:
    with pytest.raises(ValueError, match="an address of this machine alone"):
        GrpcServer(handler, address)
    with pytest.raises(ValueError, match="an address of this machine alone"):
        GrpcTransport(["localhost:1", address])
    with pytest.warns(UserWarning, match="can read and change the center: insecure=True"):
        GrpcTransport(address, insecure=True).close()


@pytest.mark.parametrize("address", ["", "5700", "host", ":5700", "host:port", "host:70000"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host and port"):
        GrpcTransport(address)


def test_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        GrpcTransport([])


def test_only_certificates_of_the_authority_are_let_in(
    authority: Path, tmp_path: Path, handler: Handler
) -> None:
    foreign = make_certificates(tmp_path, "site-a")
    ours = certificates(authority, "site-a")
    server = GrpcServer(handler, certificates=certificates(authority, "server"))
    address = f"127.0.0.1:{server.port}"
    stranger = Certificates(ours.authority, foreign.certificate, foreign.key)
    for shown in (None, foreign, stranger):
        client = CenterClient(GrpcTransport(address, certificates=shown), "0", LAYOUT, patience=0.1)
        with pytest.raises(UnreachableError):
            client.join(constant(0.0))
        client.close()
    assert handler.server.workers(0) == {}
    server.close()


def test_a_workers_certificate_makes_no_server(authority: Path, handler: Handler) -> None:
    ours = certificates(authority, "site-a")
    server = GrpcServer(handler, certificates=ours)
    transport = GrpcTransport(f"127.0.0.1:{server.port}", certificates=ours)
    client = CenterClient(transport, "0", LAYOUT, patience=0.1)
    with pytest.raises(UnreachableError):
        client.join(constant(0.0))
    client.close()
    server.close()


def test_the_log_says_whose_certificate_was_shown(
    authority: Path, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    server = GrpcServer(handler, certificates=certificates(authority, "server"))
    transport = GrpcTransport(
        f"127.0.0.1:{server.port}", certificates=certificates(authority, "site-a")
    )
    client = CenterClient(transport, "0", LAYOUT)
    with caplog.at_level(logging.WARNING), pytest.raises(Refused):
        client.get()
    assert caplog.messages[0].startswith("site-a ipv4:127.0.0.1:")
    client.close()
    server.close()


def test_who_asks_too_often_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(most_per_second=0.001, burst=2)
    handler = Handler(CenterServer(Settings(limits=limits)))
    client = CenterClient(InMemory(handler, "somebody"), "0", LAYOUT, patience=0.1)
    client.join(constant(0.0))
    client.get()
    with caplog.at_level(logging.WARNING), pytest.raises(UnreachableError, match="most_per_second"):
        client.get()
    assert caplog.messages[0].startswith("somebody was refused for the 1. time: More than 0.001")


def test_a_site_speaks_for_workers_of_its_own_only(tmp_path: Path, handler: Handler) -> None:
    shown = {name: make_certificates(tmp_path, name) for name in ("server", "site-a", "site-b")}
    server = GrpcServer(handler, certificates=shown["server"])

    def reach(incarnation: int, site: str) -> CenterClient:
        transport = GrpcTransport(f"127.0.0.1:{server.port}", certificates=shown[site])
        client = CenterClient(transport, "run/0", LAYOUT, incarnation=incarnation, patience=20)
        client.join(constant(0.0))
        return client

    mine, theirs = reach(1, "site-a"), reach(2, "site-b")  # the same name, and later
    assert mine.add(constant(1.0))[0].sequence == theirs.add(constant(1.0))[0].sequence == 1
    assert theirs.beat(team=2, progress=1, finished=True, stops=True, saves={}).stop
    assert not mine.beat(team=2, progress=1, finished=False, stops=False, saves={}).stop
    theirs.leave()
    mine.get()
    assert list(handler.server.workers(time.monotonic())) == ["site-a run/0"]
    for client in (mine, theirs):
        client.close()
    server.close()


def test_keys_are_their_owners_alone_and_never_made_twice(authority: Path) -> None:
    for path in authority.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        make_certificates(authority, "site-a")
    for name in ("", "../x", "authority", "a/b", "x" * 65):
        with pytest.raises(ValueError, match="is not allowed"):
            make_certificates(authority, name)


def test_nothing_is_left_open(handler: Handler) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def serve_once() -> None:
        server = GrpcServer(handler)
        client = CenterClient(GrpcTransport(f"127.0.0.1:{server.port}"), "0", LAYOUT)
        client.join(constant(0.0))
        client.add(constant(0.0))
        client.close()
        server.close()

    serve_once()  # what gRPC keeps for the process
    before = held()
    for _ in range(5):
        serve_once()
    until = time.monotonic() + 10
    while not held() <= before and time.monotonic() < until:
        time.sleep(0.01)  # a thread of gRPC ends a moment later
    assert held() <= before


@pytest.mark.parametrize("module", [grpc_transport, keys])
def test_without_the_extra_the_way_to_it_is_said(
    monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[async\]'"):
        importlib.import_module(module.__name__)
