"""What goes around a ring of connections: its bits, its bytes, its wake-ups and its end."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_easgd.communication import ring
from lightning_easgd.communication.ring import Ring

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rings are made on Linux only")

PRECISIONS = [torch.float32, torch.float64, torch.bfloat16]


def connections(count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Of each worker: that to the next one, and that from the one before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pairs = []
        for _ in range(count):
            sender = socket.create_connection(server.getsockname())
            pairs.append((sender, server.accept()[0]))
    return [(pairs[rank][0], pairs[rank - 1][1]) for rank in range(count)]


@contextmanager
def rings(count: int) -> Iterator[list[Ring]]:
    made = [Ring(rank, count, *pair) for rank, pair in enumerate(connections(count))]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def sum_up(made: Sequence[Ring], brought: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What each ring makes of the tensors that it brought."""
    results = [[tensor.clone() for tensor in tensors] for tensors in brought]
    works = [each.sum_(tensors) for each, tensors in zip(made, results, strict=True)]
    for work in works:
        work.wait()
        assert work.is_completed()
    return results


def reference(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Chunk j goes around from worker j on, and each worker adds what has arrived to its own."""
    workers, total = len(parts), np.empty_like(parts[0])
    bounds = [len(total) * i // workers for i in range(workers + 1)]
    for j in range(workers):
        chunk = slice(bounds[j], bounds[j + 1])
        value = parts[j][chunk]
        for step in range(1, workers):
            value = parts[(j + step) % workers][chunk] + value
        total[chunk] = value
    return total


@given(
    workers=st.integers(2, 5),
    sizes=st.lists(st.integers(0, 300), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    piece=st.sampled_from([8, 24, 2**20]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_all_workers_hold_the_bits_of_a_sum_in_the_order_of_the_ring(
    workers: int, sizes: list[int], dtype: torch.dtype, piece: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    brought = [
        [torch.randn(size, dtype=dtype, generator=generator) for size in sizes]
        for _ in range(workers)
    ]
    with pytest.MonkeyPatch.context() as patch, rings(workers) as made:
        patch.setattr(ring, "_PIECE_BYTES", piece)
        results = sum_up(made, brought)
    for mine in results:
        for i, tensor in enumerate(mine):
            expected = reference([theirs[i].numpy() for theirs in brought])
            assert tensor.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_larger_sums_than_the_kernel_takes_at_once(dtype: torch.dtype) -> None:
    size = 5_000_003
    brought = [[torch.arange(size).remainder(31).add(rank).to(dtype)] for rank in range(3)]
    with rings(3) as made:
        for (total,) in sum_up(made, brought):
            expected = torch.arange(size).remainder(31).mul(3).add(3)
            assert torch.equal(total.to(torch.int64), expected)


def test_what_a_sum_has_of_a_processor_is_told_without_the_waiting() -> None:
    with rings(2) as made:
        assert [each.processor_seconds() for each in made] == [0.0, 0.0]
        began = time.process_time()
        early = made[0].sum_([torch.ones(1_000_000)])
        time.sleep(0.5)
        made[1].sum_([torch.ones(1_000_000)]).wait()
        early.wait()
        took = time.process_time() - began
    found = [each.processor_seconds() for each in made]
    assert min(found) > 0
    assert sum(found) < took + 0.1


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 17])
def test_all_workers_get_what_each_has(workers: int, size: int) -> None:
    with rings(workers) as made:
        mine = [torch.arange(size) + 100 * rank for rank in range(workers)]
        found = [torch.full((workers, size), -1) for _ in made]
        for work in [r.gather(*pair) for r, *pair in zip(made, mine, found, strict=True)]:
            work.wait()
    assert all(each.equal(torch.stack(mine)) for each in found)


def test_sums_that_were_begun_together_end_in_their_order() -> None:
    with rings(2) as made:
        tensors = [[torch.full((10,), float(i)) for i in range(20)] for _ in made]
        works = [[r.sum_([t]) for t in mine] for r, mine in zip(made, tensors, strict=True)]
        for mine in works:
            mine[-1].wait()
            assert all(work.is_completed() for work in mine)
    for mine in tensors:
        assert [float(tensor[0]) for tensor in mine] == [2.0 * i for i in range(20)]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_each_worker_sends_what_a_ring_has_to_and_nothing_more(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = dict.fromkeys(range(workers), 0)
    send = Ring._send

    def counted(self: Ring, left: memoryview) -> memoryview:
        rest = send(self, left)
        sent[self._rank] += len(left) - len(rest)
        return rest

    monkeypatch.setattr(Ring, "_send", counted)
    numel = 8 * 1000
    with rings(workers) as made:
        sum_up(made, [[torch.ones(numel)] for _ in made])
    assert set(sent.values()) == {4 * numel * 2 * (workers - 1) // workers}


class Dribble:
    """A neighbour on both sides that sends a chunk in many small packets, some time apart."""

    def __init__(self, packets: int) -> None:
        self.packets = packets
        (to_next, from_previous), (mine, other) = connections(2)
        self.ring = Ring(0, 2, to_next, from_previous)
        self.to_ring, self.from_ring = mine, other

    def send(self, chunk: Tensor, seconds: float) -> None:
        content = chunk.numpy().tobytes()
        step = len(content) // self.packets
        self.to_ring.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(content), step):
            self.to_ring.sendall(content[at : at + step])
            time.sleep(seconds)

    def close(self) -> None:
        self.ring.close()
        self.to_ring.close()
        self.from_ring.close()


def test_packets_do_not_wake_the_thread_before_a_chunk_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = []
    wait = Ring._wait
    monkeypatch.setattr(Ring, "_wait", lambda *args: (waits.append(args), wait(*args)))
    monkeypatch.setattr(ring, "_PATIENCE_MILLISECONDS", 20_000)
    neighbour = Dribble(packets=100)
    try:
        total = torch.arange(20_000.0)
        work = neighbour.ring.sum_([total])
        neighbour.send(torch.ones(10_000), 0.002)  # chunk 1, as worker 1 has it
        neighbour.send(torch.full((10_000,), 7.0), 0.0)  # the sum of chunk 0, as it says
        work.wait()
    finally:
        neighbour.close()
    assert total[10_000:].equal(torch.arange(10_000.0, 20_000.0) + 1)
    assert total[:10_000].eq(7).all()
    assert len(waits) <= 6  # not 100


def test_what_the_kernel_does_not_tell_of_is_taken_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window that holds less than is waited for."""
    (to_next, from_previous), (to_ring, from_ring) = connections(2)
    from_previous.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    monkeypatch.setattr(ring, "_PATIENCE_MILLISECONDS", 10)
    made = Ring(0, 2, to_next, from_previous)
    try:
        total = torch.zeros(100_000)
        work = made.sum_([total])
        to_ring.sendall(torch.ones(100_000).numpy().tobytes())
        work.wait()
        assert total.eq(1).all()
    finally:
        made.close()
        to_ring.close()
        from_ring.close()


def test_a_neighbour_that_leaves_ends_what_is_under_way_and_what_follows() -> None:
    neighbour = Dribble(packets=10)
    try:
        work = neighbour.ring.sum_([torch.zeros(10)])
        following = neighbour.ring.sum_([torch.zeros(10)])
        neighbour.to_ring.close()
        for each in (work, following, neighbour.ring.sum_([torch.zeros(10)])):
            with pytest.raises(OSError, match="has left"):
                each.wait()
            assert each.is_completed()
    finally:
        neighbour.close()


def test_closing_ends_what_is_under_way_at_once() -> None:
    with rings(3) as made:
        work = made[0].sum_([torch.zeros(1000)])  # the others bring nothing
        time.sleep(0.05)
        assert not work.is_completed()
        began = time.monotonic()
        made[0].close()
        with pytest.raises(OSError, match=r"\w"):
            work.wait()
        assert time.monotonic() - began < ring._END_SECONDS
