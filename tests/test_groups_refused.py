"""What cannot be groups is refused, with what can; and how groups are arranged."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from modules import ADAMW
from staying import run_workers
from toy import Toy, loader, trainer

from lightning_easgd import Cosine, EASGDStrategy, Groups
from lightning_easgd.algorithms.groups import arrange, arrange_levels

SGD = partial(torch.optim.SGD, lr=0.1)


class Sparse(Toy):
    """Looks a row up in a table."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.table(torch.tensor([1])).sum()


def refused_by_two(rank: int) -> None:
    module = Toy(partial(torch.optim.LBFGS, lr=0.1))
    with pytest.raises(MisconfigurationException, match="LBFGS decides by the loss"):
        trainer(2, EASGDStrategy(groups=2)).fit(module, loader(rank, 2))
    with pytest.raises(ValueError, match="groups=3 does not divide the 2 workers"):
        trainer(2, EASGDStrategy(groups=3)).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match=r"does not hold every rank from 0 to 1 once.*'node'"):
        trainer(2, EASGDStrategy(groups=[[0], [2]])).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match="sparse gradient cannot be averaged"):
        trainer(2, EASGDStrategy(groups="node")).fit(Sparse(ADAMW), loader(rank, 2))


def refused_by_three(rank: int) -> None:
    unstable = EASGDStrategy(groups=Groups([[0, 1], [2]], beta=1.1))
    with pytest.raises(ValueError, match=r"Inside a group of 1, .*Set beta below 1"):
        trainer(3, unstable).fit(Toy(SGD), loader(rank, 2))
    with pytest.raises(ValueError, match="groups=2 does not divide the 3 workers"):
        trainer(3, EASGDStrategy(groups=Groups(2))).fit(Toy(SGD), loader(rank, 2))


def refused_by_six(rank: int) -> None:
    unstable = Groups([[0, 1, 2], [3, 4, 5]], beta=1.1, inside=Groups([[0, 1, 2], [3, 4], [5]]))
    with pytest.raises(ValueError, match=r"Inside a group of 1 group\(s\), .*Set beta below 1"):
        trainer(6, EASGDStrategy(groups=unstable)).fit(Toy(SGD), loader(rank, 2))
    apart = Groups("node", inside=Groups(4))
    with pytest.raises(ValueError, match=r"groups=4 does not divide the 6 workers"):
        trainer(6, EASGDStrategy(groups=apart)).fit(Toy(SGD), loader(rank, 2))


@pytest.mark.parametrize(
    ("refused", "workers"), [(refused_by_two, 2), (refused_by_three, 3), (refused_by_six, 6)]
)
def test_what_cannot_be_a_group_is_refused_on_all_workers(refused: Any, workers: int) -> None:
    run_workers(refused, workers=workers)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 5}, r"tau=5 is not a multiple of the tau=2 inside groups.* tau=4"),
        ({"tau": 1}, r"not a multiple .* tau=2\."),
        ({"tau": "auto"}, "tau='auto' is not possible with Groups.*Give it a number, or groups=2"),
        ({"tau": lambda step: 4}, "tau=.* is not possible with Groups"),
        ({"beta": Cosine(0.9, 0.1)}, "beta=.* cannot change while training goes on"),
        ({"alpha": lambda step: 0.1}, "alpha=.* cannot change while training goes on"),
        ({"rho": 0.1}, "rho=0.1 is not possible with Groups.*Leave rho out, or groups=2"),
        ({"fragments": 2}, "fragments=2 is not possible"),
        ({"compression": "int8"}, "compression='int8' is not possible"),
        ({"center_device": "cpu"}, "center_device='cpu' is not possible"),
        ({"center_average": "ema"}, "center_average='ema' is not possible"),
        ({"algorithm": "sma"}, r"algorithm=SMA.* is not possible with Groups"),
        ({"algorithm": "local_sgd"}, r"algorithm=LocalSGD.* Set algorithm='easgd', or groups=2"),
    ],
)
def test_what_is_not_possible_with_centers_of_groups_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**{"tau": 4, "groups": Groups(2, tau=2), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": None}, "does not name groups"),
        ({"members": 0}, "does not name groups"),
        ({"tau": 0}, "tau=0 is not a communication period"),
        ({"tau": "auto"}, "cannot change while training goes on"),
        ({"rho": lambda step: 1}, "rho.* cannot change while training goes on"),
        ({"beta": 2}, "beta=2 is not allowed"),
        ({"beta": 0.9, "alpha": 0.1}, "at most one of beta, alpha and rho"),
    ],
)
def test_what_makes_no_groups_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(**{"members": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inside": 2}, r"inside=2\) is not possible.*Give inside=Groups\(2, tau=...\), or None"),
        ({"tau": 3, "inside": Groups(2, tau=2)}, r"tau=3 is not a multiple of the tau=2 .*tau=4"),
        ({"inside": Groups(3)}, "groups=3 does not divide the 4 workers"),
        ({"inside": Groups(8)}, "groups=8 does not divide the 4 workers"),
        ({"rho": 0.1, "inside": Groups(2)}, "rho=0.1.* is not possible with groups inside"),
        (
            {"inside": Groups([[0, 1], [2, 4], [3, 5, 6, 7]])},
            r"group \[2, 4\] is not within .* in \[0, 1, 2, 3\] and \[4, 5, 6, 7\]\. Allowed",
        ),
        (
            {"members": [[0, 1, 2], [3, 4]], "inside": Groups([[0, 1], [2, 3], [4]])},
            r"group \[2, 3\] is not within .* in \[0, 1, 2\] and \[3, 4\]",
        ),
        (
            {"members": [[0, 1, 2], [3, 4]], "inside": Groups(2)},
            r"groups=2 does not divide the 3 workers \[0, 1, 2\] of a group",
        ),
        (
            {"members": [[0, 1], [2, 3]], "inside": Groups([[0, 1], [2]])},
            r"\[\[0, 1\], \[2\]\] does not hold every rank from 0 to 3 once",
        ),
    ],
)
def test_what_cannot_be_nested_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(**{"members": 4, **options})


def test_the_levels_must_have_periods_that_are_multiples_up_to_the_strategys() -> None:
    with pytest.raises(ValueError, match=r"tau=6 is not a multiple of the tau=4 inside groups"):
        EASGDStrategy(tau=6, groups=Groups(4, tau=4, inside=Groups(2, tau=2)))


@pytest.mark.parametrize(
    ("groups", "levels"),
    [
        (None, []),
        (2, [[[0, 1], [2, 3], [4, 5], [6, 7]]]),
        (
            Groups(4, inside=Groups(2)),
            [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]],
        ),
        (
            Groups("node", inside=Groups(2)),
            [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 2], [1, 3], [4, 6], [5, 7]]],
        ),
        (
            Groups([[3, 1, 0], [2, 4, 5, 6, 7]], inside=Groups("node")),
            [[[0, 1, 3], [2, 4, 5, 6, 7]], [[0], [1, 3], [2, 4, 6], [5, 7]]],
        ),
    ],
)
def test_a_number_and_node_part_every_group_by_itself(groups: Any, levels: Any) -> None:
    assert arrange_levels(groups, [0, 1] * 4) == levels


def test_lists_that_cross_machines_are_refused_when_these_are_known() -> None:
    groups = Groups("node", inside=Groups([[0, 2], [1, 3]]))
    assert arrange_levels(groups, [0, 1, 0, 1])[1] == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match=r"group \[0, 2\] is not within .* \[0, 1\] and \[2, 3\]"):
        arrange_levels(groups, [0, 0, 1, 1])
