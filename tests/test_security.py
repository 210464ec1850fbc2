"""Nothing that comes from other workers, or from strangers, is run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import Island, WorkerGroup, gather, plain_data

SGD = partial(torch.optim.SGD, lr=0.1)


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
        Island(group, [[0, 1]], 2**20).broadcast({"w": torch.ones(2)}, 1, "Catching up", elements=2)

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
        island = Island(group, [[0, 1]], 2**20)
        original = island.gather
        if rank == 1:
            island.gather = lambda mine, *args, **kwargs: original([2**50], *args, **kwargs)
        island.broadcast([rank], 1, "Catching up", elements=1000)

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
