"""How groups end, by errors, signals and stops, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import kill_one, stop_alone, stop_and_go_on
from lightning.fabric.utilities.exceptions import MisconfigurationException
from modules import ADAMW, Gan
from processes import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.groups import arrange

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("who", [2, 3], ids=["first", "second"])
def test_a_member_that_is_killed_is_named_to_all_workers(
    who: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sends to the other group, and one that does not."""
    kill_one(monkeypatch, {"tau": 4, "groups": 2}, [24] * 4, who, at=6)


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


def drifting(rank: int) -> None:
    """Worker 1 has a learning rate of its own from step 2 on."""
    module, strategy = Toy(SGD), EASGDStrategy(tau=4, groups=2)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 2:
            module.trainer.optimizers[0].param_groups[0]["lr"] = 0.05

    module.on_train_batch_start = on_train_batch_start
    trainer(4, strategy).fit(module, loader(rank, 10))


def test_members_that_are_not_equal_any_more_are_told() -> None:
    outcomes = run_workers(drifting, workers=4, check=False)
    assert all(outcome.error == "ExchangeError" for outcome in outcomes)
    for outcome in outcomes[:2]:
        assert "no longer hold equal weights (worker 0: checksum" in outcome.message


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("who", "counts", "within"),
    [(3, [22, 5, 22, 20], {13, 17}), (1, [22, 5, 22, 9], {13, 17, 21})],
    ids=["one that trains", "one that stands still"],
)
def test_a_signal_to_any_member_stops_all_and_they_go_on_bit_for_bit(
    who: int, counts: list[int], within: set[int], tmp_path: Path
) -> None:
    taken, own = stop_and_go_on(tmp_path, {"tau": 4, "groups": 2}, counts, who)
    assert taken in within
    assert own[0] == own[1] != own[2] == own[3]


def test_who_stops_alone_in_a_group_waits_for_all_others() -> None:
    assert stop_alone({"tau": 4, "groups": 2}) == [13, 6, 13, 13]


def refused(rank: int) -> None:
    module = Toy(partial(torch.optim.LBFGS, lr=0.1))
    with pytest.raises(MisconfigurationException, match="LBFGS decides by the loss"):
        trainer(2, EASGDStrategy(groups=2)).fit(module, loader(rank, 2))
    with pytest.raises(ValueError, match="groups=3 does not divide the 2 workers"):
        trainer(2, EASGDStrategy(groups=3)).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match=r"does not hold every rank from 0 to 1 once.*'node'"):
        trainer(2, EASGDStrategy(groups=[[0], [2]])).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match="sparse gradient cannot be averaged"):
        trainer(2, EASGDStrategy(groups="node")).fit(Sparse(ADAMW), loader(rank, 2))


class Sparse(Toy):
    """Looks a row up in a table."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.table(torch.tensor([1])).sum()


def test_what_cannot_be_a_group_is_refused_on_all_workers() -> None:
    run_workers(refused, workers=2)


@pytest.mark.parametrize(
    "groups", [0, -2, 1.5, True, "host", [], [[]], [[0, 1], [1]], [0, 1], [["0"]], [[-1, 0]], {}]
)
def test_what_names_no_groups_is_refused(groups: Any) -> None:
    with pytest.raises(ValueError, match=r"groups=.* does not name groups .*lists of ranks"):
        EASGDStrategy(groups=groups)


def test_groups_and_a_warm_up_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"groups=2 is not possible with PostLocalSGD.*Remove"):
        EASGDStrategy(algorithm="post_local_sgd", groups=2)


@pytest.mark.parametrize(
    ("groups", "arranged"),
    [
        (None, []),
        (2, [[0, 1], [2, 3]]),
        (4, [[0, 1, 2, 3]]),
        ("node", [[0, 2], [1, 3]]),
        ([[3, 1], [2, 0]], [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_numbered_by_their_lowest_rank(groups: Any, arranged: Any) -> None:
    assert arrange(groups, [7, 5, 7, 5]) == arranged
