"""Nothing that comes from other workers, or from strangers, is run."""

from __future__ import annotations

import glob
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Workers, run_workers
from torch.distributed import distributed_c10d
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import Subgroup, WorkerGroup, gather, plain_data

SGD = partial(torch.optim.SGD, lr=0.1)
_LISTENS = "0A"
"""A state in /proc/net/tcp."""


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def packed_bomb(value: object, *, hit: Path, framed: bool) -> torch.Tensor:
    """What a hostile worker sends in the place of a value."""
    content = pickle.dumps(Bomb(hit))
    head = len(content).to_bytes(8, "little") if framed else b""
    return torch.frombuffer(bytearray(head + content), dtype=torch.uint8)


def at_set_up(rank: int) -> None:
    trainer(2, EASGDStrategy(tau=2)).fit(Toy(SGD), loader(rank, 3))


def at_set_up_of_groups(rank: int) -> None:
    trainer(2, EASGDStrategy(tau=2, groups="node")).fit(Toy(SGD), loader(rank, 3))


def before_training(rank: int) -> None:
    dist.init_process_group("gloo")
    gather(rank)


def between_two(rank: int, act: Callable[[WorkerGroup], object]) -> None:
    dist.init_process_group("gloo")
    group = WorkerGroup(timedelta(seconds=20), timedelta(seconds=20))
    try:
        act(group)
    finally:
        group.abandon("over")


def of_workers(rank: int) -> None:
    between_two(rank, lambda group: group.gather(rank))


def in_a_group(rank: int) -> None:
    def catch_up(group: WorkerGroup) -> None:
        Subgroup(group, [[0, 1]], 2**20).broadcast(
            {"w": torch.ones(2)}, 1, "Catching up", elements=2
        )

    between_two(rank, catch_up)


def hostile(rank: int, target: Callable[[int], None], hit: Path, framed: bool) -> None:
    if rank == 1:
        plain_data.pack = partial(packed_bomb, hit=hit, framed=framed)
    target(rank)


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize(
    "target", [at_set_up, at_set_up_of_groups, before_training, of_workers, in_a_group]
)
def test_what_a_hostile_worker_sends_is_refused_by_name_and_not_run(
    tmp_path: Path, target: Callable[[int], None], framed: bool
) -> None:
    hit = tmp_path / "hit"
    outcomes = run_workers(hostile, target, hit, framed, workers=2, check=False)
    assert outcomes[0].error == "ExchangeError", outcomes[0]
    assert "Worker 1 did not send what workers send" in outcomes[0].message
    assert not hit.exists()


def greedy(rank: int) -> None:
    """Worker 1 names a size for which no memory must be taken."""

    def restore(group: WorkerGroup) -> None:
        subgroup = Subgroup(group, [[0, 1]], 2**20)
        original = subgroup.gather
        if rank == 1:
            subgroup.gather = lambda mine, *args, **kwargs: original([2**50], *args, **kwargs)
        subgroup.broadcast([rank], 1, "Catching up", elements=1000)

    between_two(rank, restore)


def test_a_state_that_is_far_too_large_is_refused() -> None:
    outcomes = run_workers(greedy, workers=2, check=False)
    for outcome in outcomes:
        assert outcome.error == "ExchangeError", outcome
        assert f"Worker 1 wants to send {2**50} bytes where at most 18825216" in outcome.message


def options_of_others(rank: int) -> None:
    strategy = EASGDStrategy(tau=2)
    lines = [f"tau={rank}\x1b[31m\nWorker 0 was killed", "x" * 10**6]
    type(strategy.options).lines = lambda self: lines
    trainer(2, strategy).fit(Toy(SGD), loader(rank, 3))


def test_lines_of_others_are_shown_as_theirs() -> None:
    for outcome in run_workers(options_of_others, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert 'only worker 1 has "tau=1\\x1b[31m\\nWorker 0 was killed"' in outcome.message
        assert len(outcome.message) < 2000
        assert "\n" not in outcome.message


def listening_ports() -> list[int]:
    """Of this process: of the store, if it is here, and of every gloo group."""
    mine = set()
    for path in glob.glob(f"/proc/{os.getpid()}/fd/*"):
        with suppress(FileNotFoundError):  # that of the list itself
            mine.add(os.readlink(path).removeprefix("socket:").strip("[]"))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and fields[9] in mine:
                found.append(int(fields[1].split(":")[1], 16))
    return found


def visited(rank: int, messages: list[bytes]) -> tuple[int, list[float]]:
    """Train while strangers connect to every port of this worker; how many, and the weights."""
    module, strangers = Toy(SGD), []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            for port, message in product(listening_ports(), messages):
                strangers.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                strangers[-1].sendall(message)

    module.on_train_batch_start = on_train_batch_start
    trainer(2, EASGDStrategy(tau=2)).fit(module, loader(rank, 12))
    count = len(strangers)
    for stranger in strangers:
        stranger.close()
    return count, module.w.flatten().tolist()


def test_strangers_at_the_ports_run_nothing_and_change_nothing(tmp_path: Path) -> None:
    hit = tmp_path / "hit"
    bomb = pickle.dumps(Bomb(hit))
    messages = [b"", b"GET / HTTP/1.1\r\n\r\n", bomb, len(bomb).to_bytes(8, "little") + bomb]
    alone = run_workers(visited, [], workers=2)
    met = run_workers(visited, messages, workers=2)
    assert min(count for count, _ in met) >= 2 * len(messages)  # two groups, and the store
    assert [weights for _, weights in met] == [weights for _, weights in alone]
    assert not hit.exists()


def over_tls(rank: int) -> None:
    os.environ["GLOO_DEVICE_TRANSPORT"] = "TCP_TLS"
    for name in ("PKEY", "CERT", "CA_FILE"):
        os.environ[f"GLOO_DEVICE_TRANSPORT_TCP_TLS_{name}"] = os.devnull
    at_set_up(rank)


def test_who_asks_gloo_for_tls_does_not_train_in_the_clear() -> None:
    """torch's wheels cannot do it. Where this fails, security.md may name it beside WireGuard."""
    for outcome in run_workers(over_tls, workers=2, check=False):
        assert outcome.error == "RuntimeError"
        assert "unsupported gloo device" in outcome.message


def unwilling(rank: int, folder: Path) -> None:
    """Worker 1 cannot save, and says so in a way that is to mislead."""
    fitting = trainer(2, EASGDStrategy(tau=2))
    module = Toy(SGD)

    def on_train_end() -> None:
        if rank == 1:
            save = fitting.strategy.checkpoint_io.save_checkpoint

            def fails(*args: Any, **kwargs: Any) -> None:
                save(*args, **kwargs)
                raise OSError("\x1b[2J\nAll workers are alive. " + 10**6 * "x")

            fitting.strategy.checkpoint_io.save_checkpoint = fails
        fitting.save_checkpoint(folder / "last.ckpt")

    module.on_train_end = on_train_end
    fitting.fit(module, loader(rank, 3))


def test_errors_of_others_are_shown_as_theirs(tmp_path: Path) -> None:
    outcomes = run_workers(unwilling, tmp_path, workers=2, check=False)
    assert outcomes[0].error == "CheckpointError", outcomes[0]
    assert "\\x1b[2J\\nAll workers are alive. xxx" in outcomes[0].message
    assert 'worker 1: "OSError on ' in outcomes[0].message
    assert outcomes[0].message.isprintable()
    assert len(outcomes[0].message) < 1000


def slandered(rank: int) -> str:
    """Somebody writes to the store that worker 0 listens to, in the middle of training."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=2, exchange_timeout=10)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            name = strategy._fit.group._heartbeat._store._name
            store = dist.PrefixStore(name, distributed_c10d._get_default_store().clone())
            for key in ("process/1", "sign/1"):
                store.set(key, b"[" * 10**6)
            store.set("ended/1", b"\xff\x1b[2J\n" * 10**5)
            store.set("diagnosis", b'\x1b[2J\n" Worker 0 was killed. \xff' + 10**6 * b"x")
            time.sleep(20)

    module.on_train_batch_start = on_train_batch_start
    trainer(2, strategy).fit(module, loader(rank, 12))


def test_what_strangers_write_to_the_store_is_shown_as_theirs() -> None:
    with Workers(slandered, workers=2) as group:
        (outcome,) = group.collect(40, without=1)
    assert outcome.error == "ExchangeError", outcome
    assert outcome.message.isprintable()
    assert "A worker said: \"\\x1b[2J\\n' Worker 0 was killed." in outcome.message
    assert len(outcome.message) < 4000
