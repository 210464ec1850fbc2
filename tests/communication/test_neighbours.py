"""Workers find and reach the next one, or agree that they cannot."""

from __future__ import annotations

import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from processes import run_workers
from toy import Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import neighbours
from lightning_easgd.communication.neighbours import make_ring, own_addresses
from lightning_easgd.communication.ring import Ring

SGD = partial(torch.optim.SGD, lr=0.1)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rings are made on Linux only")


class Table:
    """Where threads, as workers, tell each other values."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._barrier.wait()
        self._values[rank] = value
        self._barrier.wait()
        return list(self._values)


def meet(size: int, gather: Callable[[Table, int, Any], list[Any]] = Table.gather) -> list[Any]:
    """What make_ring gives to each of ``size`` workers."""
    table, made = Table(size), [None] * size

    def work(rank: int) -> None:
        made[rank] = make_ring(rank, size, partial(gather, table, rank), 2.0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return made


def close(made: list[Ring]) -> None:
    for each in made:
        each.close()


def sums(made: list[Ring]) -> list[float]:
    tensors = [torch.full((5,), 10.0**rank) for rank in range(len(made))]
    for work in [each.sum_([t]) for each, t in zip(made, tensors, strict=True)]:
        work.wait()
    return [float(tensor[0]) for tensor in tensors]


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_worker_reaches_the_next(size: int) -> None:
    made = meet(size)
    assert sums(made) == [sum(10.0**rank for rank in range(size))] * size
    close(made)


def with_strangers(table: Table, rank: int, value: Any) -> list[Any]:
    """Before anybody connects, strangers knock at every door: with nothing, and with a wrong word.

    One more address, at which nobody listens, comes first.
    """
    everybody = table.gather(rank, value)
    if not (isinstance(value, tuple) and value[1]):
        return everybody
    for word in (b"", b"x" * 16, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(value[1][0], 5) as stranger:
            stranger.sendall(word)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()
    return [(token, [closed, *addresses]) for token, addresses in everybody]


def test_strangers_are_turned_away_and_dead_addresses_passed_over() -> None:
    made = meet(3, with_strangers)
    assert sums(made) == [111.0] * 3
    close(made)


def to_another_listener(table: Table, rank: int, value: Any) -> list[Any]:
    """Worker 1 is told an address of worker 2 at which worker 0 listens."""
    everybody = table.gather(rank, value)
    if isinstance(value, tuple) and rank == 1:
        everybody[2] = (everybody[2][0], everybody[0][1])
    return everybody


def without_a_door(table: Table, rank: int, value: Any) -> list[Any]:
    """Worker 2 has no address."""
    return table.gather(rank, (value[0], []) if rank == 2 and isinstance(value, tuple) else value)


def on_another_system(table: Table, rank: int, value: Any) -> list[Any]:
    """Worker 1 is not on Linux."""
    return table.gather(rank, False if rank == 1 and value is True else value)


@pytest.mark.parametrize("gather", [to_another_listener, without_a_door, on_another_system])
def test_if_one_cannot_reach_the_next_all_do_without(gather: Any) -> None:
    began = time.monotonic()
    assert meet(3, gather) == [None] * 3
    assert time.monotonic() - began < 20


def test_addresses_are_those_of_the_named_interface_or_of_the_way_to_the_master(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert own_addresses()[0] == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_addresses()[0] in ("127.0.0.1", "::1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,other")
    assert own_addresses() == ["127.0.0.1"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    assert own_addresses() == []


def trained(rank: int, *, reached: bool) -> tuple[dict[str, bytes], list[str], int]:
    """The delivered center, the warnings of worker 0, and how many sums went around a ring."""
    counted: list[Any] = []
    begin = Ring.sum_
    Ring.sum_ = lambda self, buckets: (counted.append(1), begin(self, buckets))[1]
    if not reached and rank == 1:
        neighbours.own_addresses = list
    module = Toy(SGD)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        strategy = EASGDStrategy(tau=4, exchange_timeout=6)
        trainer(3, strategy).fit(module, loader(rank, 10))
    found = [str(w.message) for w in said if "GLOO_SOCKET_IFNAME" in str(w.message)]
    return bits(weights(module)), found, len(counted)


def test_workers_that_cannot_reach_each_other_train_over_gloo_and_say_so() -> None:
    outcomes = run_workers(partial(trained, reached=False), workers=3)
    centers, said, counts = zip(*outcomes, strict=True)
    assert centers[0] == centers[1] == centers[2]
    assert [len(each) for each in said] == [1, 0, 0]
    assert "could not connect to each other directly" in said[0][0]
    assert counts == (0, 0, 0)


def test_workers_that_reach_each_other_sum_around_a_ring_without_a_word() -> None:
    outcomes = run_workers(partial(trained, reached=True), workers=3)
    centers, said, counts = zip(*outcomes, strict=True)
    assert centers[0] == centers[1] == centers[2]
    assert said == ([], [], [])
    assert counts == (3, 3, 3)  # at steps 4 and 8, and the last exchange
