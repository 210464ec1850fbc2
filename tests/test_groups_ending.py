"""How groups of every kind end: by errors, signals, deaths and stops."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import kill_one, stop_alone, stop_and_go_on
from modules import Gan
from staying import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy, Groups, NonFiniteError

SGD = partial(torch.optim.SGD, lr=0.1)
OUTER = [[0, 1, 2, 5], [3, 4]]
INNER = [[0, 5], [1, 2], [3], [4]]
MEAN = {"tau": 4, "groups": 2}
TREE = {"tau": 4, "groups": Groups([[0, 3], [1, 2]], tau=2)}
NEST = {"tau": 4, "groups": Groups(OUTER, tau=2, inside=Groups(INNER))}
SLOW_TREE = {"tau": 8, "groups": Groups(2, tau=2)}
SLOW_NEST = {"tau": 16, "groups": Groups(OUTER, tau=4, inside=Groups(INNER, tau=2))}


@pytest.mark.parametrize(
    ("options", "counts", "who", "at"),
    [
        pytest.param(MEAN, [24] * 4, 2, 6, id="mean, one that sends to the other group"),
        pytest.param(MEAN, [24] * 4, 3, 6, id="mean, one that does not"),
        pytest.param(SLOW_TREE, [24] * 4, 2, 7, id="tree, one that sends to the other group"),
        pytest.param(SLOW_TREE, [24] * 4, 3, 7, id="tree, one that does not"),
        pytest.param(SLOW_NEST, [40] * 6, 5, 7, id="nest, all train"),
        pytest.param(SLOW_NEST, [40, 3, 3, 3, 40, 40], 5, 7, id="nest, idle groups"),
    ],
)
def test_a_member_that_is_killed_is_named_to_all_workers(
    options: Any, counts: list[int], who: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_one(monkeypatch, options, counts, who, at)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("options", "counts", "who", "within"),
    [
        pytest.param(MEAN, [22, 5, 22, 20], 3, {9, 13, 17}, id="mean, one that trains"),
        pytest.param(MEAN, [22, 5, 22, 9], 1, {9, 13, 17, 21}, id="mean, an idle one"),
        pytest.param(TREE, [22, 5, 22, 20], 3, {9, 13, 17}, id="tree, one that trains"),
        pytest.param(TREE, [22, 5, 22, 9], 1, {9, 13, 17}, id="tree, an idle one"),
        pytest.param(NEST, [22, 5, 5, 9, 22, 20], 2, {9, 13, 17}, id="nest, an idle one"),
    ],
)
def test_a_signal_to_any_member_stops_all_and_they_go_on_bit_for_bit(
    options: Any, counts: list[int], who: int, within: set[int], tmp_path: Path
) -> None:
    taken, own = stop_and_go_on(tmp_path, options, counts, who)
    # Worker 0 sends the signal after 8 steps; the other may not have sent its header of step 8 yet.
    assert taken in within
    if options is MEAN:
        assert own[0] == own[1] != own[2] == own[3]


@pytest.mark.parametrize("options", [MEAN, TREE], ids=["mean", "tree"])
def test_who_stops_alone_in_a_group_waits_for_all_others(options: Any) -> None:
    assert stop_alone(options) == [13, 6, 13, 13]


def apart(rank: int) -> None:
    """Worker 1 leaves a step out that its mate takes."""
    module = Gan()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        if (rank, batch_idx) != (1, 3):
            step(batch, batch_idx)

    module.training_step = training_step
    trainer(2, EASGDStrategy(tau=6, groups=2, exchange_timeout=5)).fit(module, loader(rank, 7))


def test_members_that_do_different_things_are_told() -> None:
    outcomes = run_workers(apart, workers=2, check=False)
    assert all(outcome.error == "ExchangeError" for outcome in outcomes)
    assert any("whose gradients are averaged do different" in o.message for o in outcomes)


def other_rate(module: Toy, batch_idx: int) -> None:
    if batch_idx == 2:
        module.trainer.optimizers[0].param_groups[0]["lr"] = 0.05


def other_center(module: Toy, batch_idx: int) -> None:
    if batch_idx == 3:
        group = module.trainer.strategy._fit.center.group
        group.cohorts[0].fragments[0].center.parts[0][0] += 1


def drifting(rank: int, options: Any, drift: Any) -> None:
    """Worker 1 comes to be other than its mate."""
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1:
            drift(module, batch_idx)

    module.on_train_batch_start = on_train_batch_start
    trainer(4, EASGDStrategy(**options)).fit(module, loader(rank, 40))


@pytest.mark.parametrize(
    ("options", "drift", "told"),
    [
        (
            MEAN,
            other_rate,
            dict.fromkeys((0, 1), "no longer hold equal weights (worker 0: checksum"),
        ),
        (
            TREE,
            other_center,
            {
                1: "drifted apart (worker 1: center checksum",
                2: "worker 2: center checksum",
            },
        ),
    ],
    ids=["weights", "a center of a group"],
)
def test_members_that_are_not_equal_any_more_are_told(
    options: Any, drift: Any, told: dict[int, str]
) -> None:
    outcomes = run_workers(drifting, options, drift, workers=4, check=False)
    assert all(outcome.error == "ExchangeError" for outcome in outcomes)
    for rank, message in told.items():
        assert message in outcomes[rank].message


def poisoned(rank: int) -> None:
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        module.w.data[0, 0] = float("nan")

    module.on_train_batch_start = on_train_batch_start
    fitting = trainer(4, EASGDStrategy(**TREE))
    warnings.filterwarnings("ignore", "At step")
    with pytest.raises(NonFiniteError, match="every worker"):
        fitting.fit(module, loader(rank, 20))


def test_training_ends_where_no_worker_has_finite_weights() -> None:
    run_workers(poisoned, workers=4)
