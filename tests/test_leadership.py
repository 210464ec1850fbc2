"""Who leads: running losses, what all conclude from them, and where they come from."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from staying import run_workers
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy, LeaderSGD
from lightning_easgd.algorithms.leadership import Leadership
from lightning_easgd.schedules import WorkerView

SGD = partial(torch.optim.SGD, lr=0.05)


def leading(smoothing: float, *places: list[int]) -> Leadership:
    return Leadership(smoothing, WorkerView(places))


def said(*losses: float) -> list[dict[str, float]]:
    return [{"loss": loss} for loss in losses]


@pytest.mark.parametrize(
    ("before", "losses", "leader"),
    [
        (0, [3.0, 1.0, 2.0], 1),
        (2, [1.0, 3.0, 1.0], 2),
        (1, [1.0, 3.0, 1.0], 0),
        (0, [math.nan, 5.0, -math.inf], 1),
        (1, [math.inf, math.nan, math.inf], 1),
        (0, [-1.0, -2.0, 0.0], 1),
    ],
)
def test_the_lowest_loss_leads(before: int, losses: list[float], leader: int) -> None:
    leadership = leading(0.9, [0], [1], [2])
    leadership.load_state({"leader": before}, None)
    leadership.hear(said(*losses))
    assert leadership.leader == leader


def test_a_group_leads_by_the_mean_loss_of_its_members() -> None:
    leadership = leading(0.9, [0, 3], [1, 2, 4])
    leadership.hear(said(2.0, 0.0, 2.0, 1.0, 2.0))
    assert leadership.leader == 1
    leadership.hear(said(2.0, 0.0, 2.0, 1.0, math.nan))
    assert leadership.leader == 0


def test_the_running_loss_forgets_what_is_not_finite() -> None:
    leadership = leading(0.75, [0], [1])
    assert leadership.announce() == {"loss": math.inf}
    for loss, mean in [(4.0, 4.0), (8.0, 5.0), (math.nan, math.nan), (2.0, 2.0), (6.0, 3.0)]:
        assert leadership.observe({"loss": torch.tensor(loss)})
        assert leadership.announce()["loss"] == pytest.approx(mean, rel=0, nan_ok=True)
    resumed = leading(0.75, [0], [1])
    resumed.load_state(leadership.shared_state(), leadership.own_state())
    resumed.observe(torch.tensor(7.0))
    assert resumed.announce() == {"loss": 4.0}


class Manual(Toy):
    """Optimizes by itself, and returns what it is told to."""

    def __init__(self, returned: Any) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False
        self.returned = returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return self.returned(loss)


def by_hand(rank: int, make: Any) -> dict[str, np.ndarray]:
    module = make()
    strategy = EASGDStrategy(algorithm=LeaderSGD(0.4), tau=3)
    trainer(2, strategy).fit(module, loader(rank, 20))
    return weights(module)


def by_hand_every_way(rank: int) -> list[dict[str, np.ndarray]]:
    ways = [partial(Manual, lambda loss: loss), partial(Manual, lambda loss: {"loss": loss})]
    return [by_hand(rank, make) for make in ways]


def test_manual_optimization_returns_its_loss() -> None:
    """As a tensor or in a dictionary, as under automatic optimization."""
    (as_tensor, in_dictionary), others = run_workers(by_hand_every_way, workers=2)
    for key, value in as_tensor.items():
        assert np.array_equal(value, in_dictionary[key])
        assert np.array_equal(value, others[0][key])


def without_loss(rank: int) -> None:
    by_hand(rank, partial(Manual, lambda loss: None))


def test_manual_optimization_without_a_loss_is_refused() -> None:
    outcomes = run_workers(without_loss, workers=2, check=False)
    for outcome in outcomes:
        assert outcome.error == "MisconfigurationException"
        assert "LeaderSGD" in outcome.message
        assert "Return the loss" in outcome.message
