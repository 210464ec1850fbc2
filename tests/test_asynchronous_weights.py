"""Differences that a server weights: by their samples, their staleness, or to shorten them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from at_a_server import Worker, served
from torch import nn

from lightning_easgd.schedules.even import Even
from lightning_easgd.server import Settings
from lightning_easgd.server.roster import Roster
from lightning_easgd.strategy.samples import samples_in


class Still(nn.Module):
    """Only exchanges move it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 0.0 * self.x.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.x], lr=1.0)


def at(server: Any, x: float, *, samples: int = 1, **options: Any) -> Worker:
    worker = server.worker(Still(), **options)
    worker.samples = samples
    with torch.no_grad():
        worker.module.x.fill_(x)
    return worker


def test_more_samples_weigh_more_over_the_mean_of_the_workers() -> None:
    """c <- c + w d and x <- x - w d, with w = n / mean(n): by hand, at alpha = 0.4."""
    with served(beta=0.8, workers=2, weight="samples") as server:
        workers = [at(server, 1.0, overlap=False), at(server, 2.0, samples=3, overlap=False)]
        for worker in workers:
            worker.step()
        seen = []
        for worker in (*workers, workers[0]):
            worker.step()
            seen.append([worker.weights["x"][0], server.center["x"][0]])
        # The first has w = 1, the second 3 / 2, and then the first 1 / 2.
        np.testing.assert_allclose(seen, [[0.6, 0.4], [1.04, 1.36], [0.752, 1.208]], rtol=1e-12)


@pytest.mark.parametrize("codec", [None, "int8", "bf16"])
@pytest.mark.parametrize(
    "options", [{"weight": "samples"}, {"staleness": "scale"}, {"max_norm": 0.3}], ids=str
)
def test_what_a_weight_leaves_out_stays_with_the_worker(
    options: dict[str, Any], codec: str | None
) -> None:
    """Conservation of the sum of workers and center, however differences are weighted."""
    with served(beta=0.9, workers=3, **options) as server:
        workers = [at(server, float(n), samples=n, codec=codec) for n in (1, 2, 3)]
        for count in (2, 1, 3, 2):
            for worker in workers:
                for _ in range(count):
                    worker.step()
        for worker in workers:
            with worker.exchange.swapped():
                pass
        kept = [w.exchange.own_state()["residual"].get("one_way", {}).values() for w in workers]
        rest = sum(float(each) for values in kept for each in values)
        total = sum(w.weights["x"][0] for w in workers) + server.center["x"][0] + rest
        assert total == pytest.approx(6.0, abs=1e-12)
        assert server.center["x"][0] > 0.5


def test_unequal_workers_exchange_equally_often() -> None:
    """With speeds 1, 2 and 4, periods of 10 in the mean are 10 times those over 7/3."""
    with served(beta=0.9, workers=3, tau="even") as server:
        workers = [
            at(server, x, tau=Even(10), speed=speed, batches=2000)
            for x, speed in ((1.0, 1.0), (2.0, 2.0), (3.0, 4.0))
        ]
        for _ in range(300):  # seconds
            for worker, count in zip(workers, (1, 2, 4), strict=True):
                for _ in range(count):
                    worker.step()
                worker.exchange.drain()
        assert [worker.exchange.telemetry.tau for worker in workers] == [4, 9, 17]
        assert [worker.exchange.telemetry.exchanges for worker in workers] == [
            pytest.approx(300 * 7 / 30, rel=0.1)
        ] * 3
        total = sum(w.weights["x"][0] for w in workers) + server.center["x"][0]
        assert total == pytest.approx(6.0, abs=1e-12)


def test_periods_are_in_bounds_smoothed_and_equal_in_turn() -> None:
    def periods(*speeds: float, **settings: Any) -> list[int]:
        roster = Roster(Settings(tau="even", **settings))
        known = [roster.join(f"{n}", 1, version=0, now=0) for n in range(len(speeds))]
        for worker, speed in zip(known, speeds, strict=True):
            roster.hear_speed(worker, speed)
        return [roster.period(worker, now=0) for worker in known]

    assert periods(1.0, 3.0) == [5, 15]
    assert periods(1.0, 0.0, 3.0) == [5, 10, 15]  # one does not know its speed
    assert periods(1e-6, 1.0, *[1e-6] * 20) == [1, 80, *[1] * 20]
    assert periods(1.0, 3.0, order="round_robin", workers=2) == [10, 10]
    roster = Roster(Settings(tau="even"))
    worker = roster.join("a", 1, version=0, now=0)
    for speed in (4.0, 8.0, 0.0):
        roster.hear_speed(worker, speed)
    assert worker.speed == 5.0


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(5, 2), 5),
        ([torch.tensor(1.0), {"x": torch.zeros(4)}], 4),
        ({"a": "text", "b": (torch.zeros(3), torch.zeros(7))}, 3),
        (None, 1),
    ],
)
def test_samples_are_counted(batch: Any, count: int) -> None:
    assert samples_in(batch) == count
