"""A center that is cut: each server has a slice, and a worker meets all of them as one."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from served import LAYOUT, constant, random_vector, values
from waiting import until

from lightning_easgd.algorithms import MDownpour
from lightning_easgd.center.flat import FlatLayout
from lightning_easgd.server import CenterServer, Refusal, Refused, Settings, SnapshotError
from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import (
    CenterClient,
    InMemory,
    PendingError,
    UnreachableError,
)
from lightning_easgd.server.form import Form
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.sharded import ShardedClient
from lightning_easgd.server.shards import Shard, address_of, joined

pytestmark = pytest.mark.timeout(60)

ODD = FlatLayout(
    [
        ("none", torch.empty(0)),
        ("double", torch.empty(3, 1, dtype=torch.float64)),
        ("a", torch.empty(2, 5)),
        ("empty", torch.empty(4, 0)),
        ("b", torch.empty(3)),
    ]
)


class Servers:
    """The servers of a center, in memory; any may be away."""

    def __init__(self, shards: int, **settings: Any) -> None:
        self.handlers = [
            Handler(CenterServer(Settings(shard=shard, shards=shards, **settings)))
            for shard in range(shards)
        ]
        self.away: set[int] = set()
        self.luck: random.Random | None = None

    def client(self, worker: str = "0", **options: Any) -> ShardedClient:
        return ShardedClient(lambda n: At(self, n), worker, LAYOUT, **{"patience": 20.0, **options})

    def joined(self, worker: str = "0", start: float = 0.0) -> ShardedClient:
        client = self.client(worker)
        client.join(constant(start))
        return client

    def slices(self) -> list[np.ndarray]:
        return [values(handler.server.delivered()) for handler in self.handlers]

    def center(self) -> np.ndarray:
        return values(joined(LAYOUT, [each.server.delivered() for each in self.handlers]))


class At(InMemory):
    """A server that may be away, or on whose way messages may be lost."""

    def __init__(self, servers: Servers, number: int) -> None:
        super().__init__(servers.handlers[number])
        self._servers, self._number = servers, number

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        fate = self._servers.luck.random() if self._servers.luck else 1.0
        if fate < 0.2 or self._number in self._servers.away:
            raise LostError("away")
        answer = list(super().call(frames, deadline))
        if fate < 0.4:
            raise LostError("away before it answered")
        return iter(answer)


@pytest.mark.parametrize("layout", [LAYOUT, ODD], ids=["two precisions", "odd"])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_slices_have_every_element_once(layout: FlatLayout, shards: int) -> None:
    vector = random_vector(0, layout)
    layouts = [Shard(number, shards).layout(layout) for number in range(shards)]
    slices = [Shard(n, shards).slice_of(vector, each) for n, each in enumerate(layouts)]
    for each, its in zip(slices, layouts, strict=True):
        assert [part.numel() for part in each.parts] == list(its.sizes.values())
    np.testing.assert_array_equal(values(joined(layout, slices)), values(vector))
    names = [name for each in layouts for name in each.names]
    assert len(set(names)) == len(names)
    sizes = [sum(each.sizes.values()) for each in layouts]
    assert max(sizes) - min(sizes) <= len(layout.sizes)


def test_pieces_say_of_what_they_are() -> None:
    layout = Shard(1, 2).layout(FlatLayout([("a", torch.empty(2, 5)), ("b", torch.empty(4))]))
    assert [(slot.name, slot.shape) for slot in layout.slots] == [
        *(("a[2, 5][7:10]", (3,)), ("b", (4,))),
    ]


def test_more_shards_than_elements_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shards=4 is not allowed. Allowed: at most as many"):
        [Shard(n, 4).layout(FlatLayout([("b", torch.empty(3))])) for n in range(4)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "mdownpour"},
        {"algorithm": "downpour", "center_average": "polyak"},
        {"workers": 2, "order": "round_robin"},
    ],
    ids=str,
)
def test_several_servers_have_the_center_of_one(settings: dict[str, Any], overlap: bool) -> None:
    def run(shards: int) -> tuple[np.ndarray, list[Any]]:
        servers, seen = Servers(shards, **settings), []
        clients = [servers.client(name, incarnation=1) for name in "ab"]
        for client in clients:
            seen.append(client.join(random_vector(0)))
        for seed in range(1, 7):
            receipt, center = clients[seed % 2 - 1].add(random_vector(seed), fetch=overlap)
            seen.append((receipt, None if center is None else values(center).tolist()))
            if not overlap:
                version, center = clients[seed % 2].get()
                seen.append((version, values(center).tolist()))
        for client in clients:
            client.leave()
        return servers.center(), seen

    one, several = run(1), run(3)
    np.testing.assert_array_equal(one[0], several[0])
    assert one[1] == several[1]


def test_a_server_that_is_away_gets_a_difference_later_and_once() -> None:
    servers = Servers(3)
    client = servers.joined()
    for _ in range(3):
        client.add(constant(1.0))
    kept = servers.handlers[1].server.snapshot()
    servers.away = {1}
    thread = threading.Thread(target=client.add, args=(constant(1.0),))
    thread.start()
    until(lambda: [each.max() for each in servers.slices()] == [4.0, 3.0, 4.0])
    until(lambda: client.lost == "away")
    assert client.pending
    restored = Handler(CenterServer(Settings(shard=1, shards=3)))
    restored.server.restore(kept, now=0)
    servers.handlers[1] = client._clients[1]._transport._handler = restored
    servers.away = set()
    thread.join(30)
    assert not client.pending
    assert client.lost is None
    np.testing.assert_array_equal(servers.center(), 4.0)
    assert [each.server.version for each in servers.handlers] == [4, 4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_every_server_adds_every_difference_once(seed: int) -> None:
    servers, total = Servers(3), [0.0, 0.0]
    clients = [servers.joined(f"{worker}") for worker in range(2)]
    servers.luck = random.Random(seed)

    def work(worker: int) -> None:
        client, luck = clients[worker], random.Random(seed + worker)
        for each in client._clients:
            each._sleep = lambda seconds: None
        for _ in range(20):
            value = float(2 ** luck.randrange(10))
            client.add(constant(value), fetch=luck.random() < 0.5)
            total[worker] += value

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(servers.center(), sum(total))
    assert [each.server.version for each in servers.handlers] == [40, 40, 40]


def test_who_gives_up_keeps_the_difference_until_all_have_given_a_receipt() -> None:
    servers = Servers(2)
    client = servers.joined()
    servers.away, client.patience = {1}, 0.0
    with pytest.raises(UnreachableError, match=r"within 0 s \(away\)"):
        client.add(constant(1.0), fetch=True)
    assert client.pending
    with pytest.raises(PendingError, match="call resend"):
        client.add(constant(2.0))
    with pytest.raises(UnreachableError):
        client.resend()
    servers.away = set()
    receipt, center = client.resend()
    assert (receipt.sequence, receipt.version) == (1, 1)
    assert center is not None
    np.testing.assert_array_equal(values(center), 1.0)
    assert client.add(constant(1.0))[0].version == 2
    np.testing.assert_array_equal(servers.center(), 2.0)


def test_a_difference_that_one_server_refuses_is_said_and_the_next_one_counts() -> None:
    servers = Servers(2)
    client, broken = servers.joined(), constant(1.0)
    broken.parts[0][-1] = math.nan
    with pytest.raises(Refused, match="values that are not finite"):
        client.add(broken)
    assert not client.pending
    client.add(constant(1.0))
    assert [set(each) for each in servers.slices()] == [{2.0}, {1.0}]


def test_an_abandoned_worker_waits_for_no_server() -> None:
    servers = Servers(2)
    client = servers.joined()
    servers.away, client.patience = {0, 1}, math.inf
    failed: list[Exception] = []

    def add() -> None:
        try:
            client.add(constant(1.0))
        except UnreachableError as error:
            failed.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    until(lambda: client.lost)
    client.abandon()
    thread.join(10)
    assert len(failed) == 1
    client.close()


def test_the_center_that_workers_begin_at_is_that_of_one() -> None:
    for _ in range(20):
        servers = Servers(3)
        threads = [threading.Thread(target=servers.joined, args=(f"{n}", n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(set(servers.center())) == 1


def test_a_server_that_lost_its_slice_gets_no_other_worker_s() -> None:
    servers = Servers(2)
    servers.joined().add(constant(1.0))
    servers.handlers[1] = Handler(CenterServer(Settings(shard=1, shards=2)))
    with pytest.raises(UnreachableError, match="Some servers of this center have none"):
        servers.client("1", patience=0.0).join(constant(5.0))
    assert not servers.handlers[1].server.has_center


def test_weights_that_are_not_finite_begin_no_center() -> None:
    servers, weights = Servers(2), constant(1.0)
    weights.parts[0][-1] = math.inf
    with pytest.raises(Refused, match="The weights of this worker are not finite"):
        servers.client().join(weights)
    assert not servers.handlers[0].server.has_center


def test_a_server_of_another_slice_is_not_taken_for_it() -> None:
    servers = Servers(2)
    servers.handlers.reverse()
    with pytest.raises(
        Refused, match=r"has shard 1 of 2 of its center, and was asked for \[0, 2\]"
    ):
        servers.joined()
    with pytest.raises(Refused, match=r"was asked for \[0, 1\]") as refused:
        CenterClient(InMemory(servers.handlers[0]), "0", LAYOUT).ask_terms()
    assert refused.value.reason is Refusal.OTHER_SHARD


def test_servers_that_contradict_each_other_are_named() -> None:
    servers = Servers(2)
    servers.handlers[1] = Handler(CenterServer(Settings(shard=1, shards=2, tau=7)))
    with pytest.raises(ValueError, match="Server 1 of this center has easgd with tau=7"):
        servers.joined()
    servers.handlers = [
        Handler(CenterServer(Settings(MDownpour(momentum), shard=number, shards=2)))
        for number, momentum in enumerate((0.9, 0.5))
    ]
    with pytest.raises(ValueError, match=r"mdownpour with tau=1, .*momentum=0\.5"):
        servers.joined()


def test_another_model_is_named_by_the_piece_that_differs() -> None:
    servers = Servers(2)
    servers.joined()
    other = FlatLayout([("weight", torch.empty(20, 31)), ("bias", torch.empty(7).double())])
    with pytest.raises(Refused, match=r"'weight\[20, 31\]\[0:310\]'.*'weight\[31, 20\]\[0:310\]'"):
        ShardedClient(lambda n: At(servers, n), "1", other).ask_terms()


def test_a_snapshot_of_another_slice_is_refused() -> None:
    servers = Servers(2)
    servers.joined()
    snapshot = servers.handlers[0].server.snapshot()
    for shard, shards in ((1, 2), (0, 1), (0, 3)):
        with pytest.raises(SnapshotError, match=rf"shard=0 of 2, and .* shard={shard} of {shards}"):
            CenterServer(Settings(shard=shard, shards=shards)).restore(snapshot, now=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shards": 0}, "shards=0 is not allowed"),
        ({"shards": 2, "shard": 2}, "shard=2 is not allowed. Allowed: a whole number from 0 to 1"),
        ({"shard": -1}, "shard=-1 is not allowed"),
        ({"shards": 2, "max_norm": 1.0}, "max_norm=1.0 is not allowed. Allowed: with several"),
        ({"shards": 2, "staleness": "scale"}, "staleness='scale' is not allowed"),
        ({"shards": 2, "weight": "samples"}, "weight='samples' is not allowed"),
    ],
    ids=str,
)
def test_what_slices_do_not_allow_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**options)


def test_servers_are_at_ports_one_after_the_other() -> None:
    assert address_of("host:5700", 0) == "host:5700"
    assert address_of("[::1]:5700", 2) == "[::1]:5702"
    assert address_of("host", 1) == "host"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_difference_becomes_what_arrives_of_it_in_the_form_of_a_codec(shards: int) -> None:
    servers = Servers(shards, algorithm="downpour")
    client, difference = servers.joined(), random_vector(3)
    client.add(difference, Form("int8", {"float32": 250, "float64": 1}))
    assert not np.array_equal(values(difference), values(random_vector(3)))
    np.testing.assert_array_equal(servers.center(), values(difference))
    for mine, sent, buffers in zip(difference.parts, random_vector(3).parts, (250, 1), strict=True):
        assert torch.equal(mine[-buffers:], sent[-buffers:])
        torch.testing.assert_close(mine, sent, atol=0.02, rtol=0)
