"""tau="auto": what is measured, what is chosen from it, and that all workers choose alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from against_reference import OPTIMIZERS
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from toy import Resumable, Toy, loader, trainer, weights

from lightning_easgd import Auto, EASGDStrategy
from lightning_easgd.exchange.timing import StepTimer
from lightning_easgd.schedules import Durations, Observation, Period
from lightning_easgd.schedules.automatic import AutomaticPeriod


class Simulated:
    """A worker whose steps, sums and exchanges take what they are told, in seconds.

    ``crowded``: by how much others on its processors lengthen a step while its sums are under way;
    ``vary``: standard deviation of a step, in steps.
    """

    def __init__(
        self,
        step: float,
        exchange: float,
        cost: float,
        crowded: float = 0.0,
        vary: float = 0.0,
        fragments: int = 1,
        **bounds: Any,
    ) -> None:
        self.step, self.exchange, self.cost, self.crowded = step, exchange, cost, crowded
        self.vary, self.random = vary, random.Random(0)
        self.said: list[str] = []
        within = Auto(**bounds)
        automatic = AutomaticPeriod(within, fragments=fragments, log=self.said.append)
        self.period = Period(automatic, fragments)
        self.now = self.used = self.waited = 0.0
        self.timer = StepTimer(lambda: self.now, lambda: self.used)
        self.arrival = 0.0

    def train(self, steps: int) -> int:
        """τ after so many steps."""
        tau, due = self.period.after(0)
        for clock in range(steps):
            if clock == due:
                late = max(0.0, self.arrival - self.now)
                self.now += late
                self.waited += late
                self.timer.wait(late)
                self.timer.arrive()
                if self.period.schedule.observe(Observation([self.timer.durations()])):
                    self.timer.restart()
                tau, due = self.period.after(clock)
                self.now += self.cost
                self.used += self.cost
                self.timer.exchange()
                self.arrival = self.now + self.exchange
            self.now += self.crowded if self.now < self.arrival else 0.0
            step = self.step * max(0.5, self.random.gauss(1.0, self.vary))
            self.now += step
            self.used += step
            self.timer.step(lambda: self.now >= self.arrival)
        return tau


@pytest.mark.parametrize(
    ("step", "exchange", "cost", "tau"),
    [
        (0.1, 0.01, 0.0, 1),
        (0.1, 0.09, 0.0, 1),
        (0.1, 0.38, 0.0, 4),
        (0.1, 1.45, 0.0, 15),
        (0.1, 0.001, 0.01, 5),
        (0.1, 0.38, 0.019, 10),
        (0.01, 0.5, 0.0, 50),
        (0.01, 5.0, 0.0, 64),
    ],
)
def test_the_smallest_period_is_found(step: float, exchange: float, cost: float, tau: int) -> None:
    assert Simulated(step, exchange, cost).train(3000) == pytest.approx(tau, abs=1, rel=0.1)


def test_what_varies_from_step_to_step_averages_out() -> None:
    found = []
    for seed in range(8):
        worker = Simulated(0.1, 0.38, 0.016, vary=0.15)
        worker.random.seed(seed)
        found.append(worker.train(12000))
    assert found == [pytest.approx(8, abs=2)] * 8


def test_half_of_what_others_take_of_the_processors_is_a_cost_of_the_exchange() -> None:
    """With time alone τ would be 22: 5 steps are 9 ms longer."""
    assert Simulated(0.1, 0.48, 0.0, crowded=0.009).train(3000) == pytest.approx(11, abs=1)
    assert Simulated(0.1, 0.48, 0.016, crowded=0.009).train(3000) == pytest.approx(19, abs=1)


def test_once_it_is_found_nobody_waits() -> None:
    worker = Simulated(0.1, 0.48, 0.0)
    worker.train(1000)
    before = worker.waited
    worker.train(1000)
    assert worker.waited - before < 0.02 * 100


def test_it_is_found_again_when_the_network_or_the_model_changes() -> None:
    worker = Simulated(0.1, 0.38, 0.0)
    assert worker.train(400) == 4
    said = len(worker.said)
    assert worker.train(400) == 4
    assert len(worker.said) == said
    worker.exchange = 0.78
    assert worker.train(400) == 8
    worker.step = 0.2
    assert worker.train(400) == 4
    assert "A step takes 200.0 ms and an exchange 7" in worker.said[-1]


def test_the_bounds_hold_and_are_said() -> None:
    worker = Simulated(0.01, 1.0, 0.0, max=20)
    assert worker.train(1000) == 20
    assert "Exchanges do not hide: max=20" in worker.said[-1]
    assert Simulated(0.1, 0.01, 0.0, min=3).train(1000) == 3


def test_with_fragments_each_has_its_part_of_the_period_to_hide() -> None:
    assert Simulated(0.1, 0.18, 0.0, fragments=4).train(1000) == 8


def test_stalls_and_pauses_do_not_count() -> None:
    worker = Simulated(0.1, 0.38, 0.0)
    assert worker.train(200) == 4
    for _ in range(20):
        worker.now += 60
        worker.timer.interrupt()
        worker.train(30)
    assert worker.train(100) == 4


def test_it_falls_by_halves_and_rises_at_once() -> None:
    said: list[str] = []
    period = AutomaticPeriod(log=said.append)
    known = Observation([Durations(100_000, 50_000, 0)])
    found = []
    for _ in range(256):
        period.observe(known)
        found.append(int(period.at(0)))
    assert [found[rounds] for rounds in (1, 2, 15, 63, 255)] == [10, 5, 3, 2, 1]
    assert said[0].endswith("It falls to 1 by halves.")
    assert "halves" not in said[-1]
    period.observe(Observation([Durations(100_000, 4_000_000, 0)]))  # and forget the rest
    for _ in range(3):
        period.observe(Observation([Durations(100_000, 4_000_000, 0)]))
    assert period.at(0) == 40


def test_the_slowest_worker_and_the_last_to_begin_count() -> None:
    said: list[str] = []
    period = AutomaticPeriod(log=said.append)
    workers = [Durations(50_000, 900_000, 0), Durations(100_000, 500_000, 4_000), Durations()]
    for _ in range(3):
        period.observe(Observation(workers))
    assert Period(period).after(0) == (5, 5)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": "often"}, "tau='often' is not a communication period.*'auto'"),
        ({"tau": "auto", "overlap": False}, "with overlap=False: .* none does. Set overlap=True"),
        ({"tau": Auto(max=8), "overlap": False}, r"tau=Auto\(min=1, max=8\) is not possible with"),
        ({"tau": Auto(max=3), "fragments": 4}, "a multiple of fragments=4"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min": 0}, "min=0 is not allowed. Allowed: a whole number of optimizer steps"),
        ({"max": 1.5}, "max=1.5 is not allowed"),
        ({"min": 9, "max": 8}, r"Auto\(min=9, max=8\) leaves no period"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Auto(**bounds)


def test_auto_alone_is_the_word() -> None:
    of = [EASGDStrategy(tau=tau).options.rules.period for tau in ("auto", Auto())]
    assert [str(period) for period in of] == ["auto, from 1 to 64"] * 2


def fit(rank: int, folder: Path, resume: str | None) -> Any:
    module = Toy(OPTIMIZERS["nesterov"])
    strategy = EASGDStrategy(tau=Auto(min=2, max=40))
    taus: list[int] = []
    module.on_train_batch_end = lambda *_: taus.append(strategy.telemetry.tau)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=50, save_top_k=-1)
    options = {"max_epochs": 4, "enable_checkpointing": True, "callbacks": [saving]}
    trainer(2, strategy, **options).fit(module, Resumable(rank, 100), ckpt_path=resume)
    return taus, {name: value.tobytes() for name, value in weights(module).items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_all_workers_choose_alike_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    (taus, center), other = run_workers(fit, tmp_path, None, workers=2)
    assert (taus, center) == other
    assert set(taus) != {10}
    assert {2 <= tau <= 40 for tau in taus} == {True}
    (later, center), other = run_workers(fit, tmp_path, str(tmp_path / "step=350.ckpt"), workers=2)
    assert (later, center) == other
    assert later[0] == taus[350]


def uneven(rank: int) -> Any:
    strategy = EASGDStrategy(tau="auto")
    module = Toy(OPTIMIZERS["sgd"])
    trainer(2, strategy, max_epochs=2).fit(module, loader(rank, 40 + 60 * rank))
    return strategy.telemetry.tau, json.dumps({k: v.tolist() for k, v in weights(module).items()})


def test_who_has_fewer_batches_chooses_with_the_others() -> None:
    first, second = run_workers(uneven, workers=2)
    assert first == second
