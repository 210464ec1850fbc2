"""The pull that looks ahead, in the engine itself: what is stable, and how far the center lags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_memory import Wire, make_worker, run_threads
from torch import Tensor, nn

from lightning_easgd import EASGD, EASGDStrategy
from lightning_easgd.algorithms.elastic import pull_bound


class Unbounded(EASGD):
    """One that nothing refuses."""

    beta_bound = 9.0  # type: ignore[assignment]


class Slope(nn.Module):
    """A quadratic as flat as possible, beside a slope that is given at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def loss(self, slope: float) -> Tensor:
        return (0.5e-9 * self.x**2 - slope * self.x).sum()


def train(wire: Wire, rank: int, options: dict[str, Any], slopes: list[float]) -> list[Any]:
    """The center, and how far the worker is from it, after each exchange."""
    module, seen = Slope(), []
    worker = make_worker(wire, rank, module, EASGDStrategy(tau=1, **options), steps=len(slopes))
    for slope in slopes:

        def closure(slope: float = slope) -> Tensor:
            worker.exchange.before_batch()
            worker.optimizer.zero_grad()
            loss = module.loss(slope)
            loss.backward()
            return loss

        worker.step(closure)
        worker.exchange.drain()
        center = float(worker.center.cohorts[0].fragments[0].center.parts[0])
        seen.append((center, abs(module.x.item() - center)))
    return seen


def distance(pull: float, look_ahead: float, beta: float) -> float:
    """Of two workers that were pushed once, 200 exchanges later."""
    options = {"algorithm": Unbounded(pull=pull, look_ahead=look_ahead), "beta": beta}
    runs = run_threads(train, options, [1.0] + [0.0] * 200, workers=2)
    return max(far for run in runs for _, far in run[-9:])


@pytest.mark.parametrize(("pull", "look_ahead"), [(0.4, 0), (0.7, 1), (0.4, 1), (0.5, 8)])
def test_the_bound_separates_convergence_from_divergence(pull: float, look_ahead: float) -> None:
    bound = pull_bound(pull, look_ahead)
    assert distance(pull, look_ahead, 0.9 * bound) < 1e-2
    assert distance(pull, look_ahead, 1.1 * bound) > 1e2
    with pytest.raises(ValueError, match="diverges with EASGD"):
        EASGDStrategy(algorithm=EASGD(pull=pull, look_ahead=look_ahead), beta=1.001 * bound)


@pytest.mark.parametrize(
    ("algorithm", "part"),
    [
        (EASGD(), 2 / 3),
        (EASGD(pull=0.4), 0.9 / 1.3),
        (EASGD(pull=0.4, look_ahead=1), 0.9 / (1.3 - 0.36)),
    ],
    ids=str,
)
def test_how_far_the_center_goes_where_all_workers_go_alike(algorithm: EASGD, part: float) -> None:
    (seen, _) = run_threads(train, {"algorithm": algorithm}, [1.0] * 200, workers=2)
    (before, _), (after, _) = seen[-2:]
    assert after - before == pytest.approx(part, rel=1e-4)


def test_telemetry_has_the_pull() -> None:
    def alpha(wire: Wire, rank: int) -> float:
        strategy = EASGDStrategy(algorithm=EASGD(pull=0.4), tau=1)
        worker = make_worker(wire, rank, module := Slope(), strategy, steps=3)
        for _ in range(3):
            worker.step(lambda: module.loss(1.0).backward())
        return strategy.telemetry.alpha

    assert run_threads(alpha, workers=2) == [0.4, 0.4]
