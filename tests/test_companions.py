"""A rule and an adaptive schedule that need what only workers know: each is one file, as here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from staying import run_workers
from toy import Toy, loader, trainer
from typing_extensions import override

from lightning_easgd import (
    EASGD,
    SMA,
    AdaptivePeriod,
    Companion,
    EASGDStrategy,
    LeaderSGD,
    Rule,
    Schedule,
)
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.schedules import Observation, Period, Strength, WorkerView

# A rule: workers count as much as they say.


class Weight(Companion):
    """A worker's weight in the mean, of all that were said with the exchange before."""

    def __init__(self, mine: float, field: str = "weight") -> None:
        self.fields = {field: float}
        self._field, self._mine = field, mine
        self._part: float | None = None

    @override
    def announce(self) -> Mapping[str, Any]:
        return {self._field: self._mine}

    @override
    def hear(self, said: Sequence[Mapping[str, Any]]) -> None:
        self._part = self._mine / sum(each[self._field] for each in said)

    @override
    def share(self, share: float) -> float:
        return share if self._part is None else self._part


class WeightedMean(Rule):
    """c <- c + Σ_i w_i (x_i - c) ;  x_i <- c, with w_i = 1/p at first."""

    average = False

    def __init__(self, mine: float = 1.0, field: str = "weight") -> None:
        self._mine, self._field = mine, field

    @override
    def companions(self, worker: WorkerView) -> list[Companion]:
        return [Weight(self._mine, self._field)]

    @override
    def share(self, workers: int) -> float:
        return 1 / workers

    @override
    def __repr__(self) -> str:
        return "WeightedMean()"

    @override
    def move_(self, center: torch.Tensor, total: torch.Tensor, state: dict[str, Any]) -> None:
        center.add_(total)


# A schedule: τ grows when the workers' mean loss has fallen.


class LatestLoss(Companion):
    fields: Mapping[str, type] = {"latest_loss": float}

    def __init__(self) -> None:
        self._loss = float("inf")

    @override
    def observe(self, output: object) -> bool:
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, torch.Tensor)
        self._loss = float(loss.detach())
        return True

    @override
    def announce(self) -> Mapping[str, Any]:
        return {"latest_loss": self._loss}


class LongerWhenLow(Schedule):
    """τ is 2 until the mean loss is below ``low``, then 3."""

    def __init__(self, low: float) -> None:
        self.low = low
        self._heard: list[float] = []

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return 2, 3

    @override
    def at(self, step: int) -> float:
        return 3 if self._heard and self._heard[-1] < self.low else 2

    @override
    def companions(self, worker: WorkerView) -> list[Companion]:
        return [LatestLoss()]

    @override
    def observe(self, seen: Observation) -> bool:
        losses = [said["latest_loss"] for said in seen.said]
        self._heard.append(sum(losses) / len(losses))
        return False

    @override
    def state(self) -> dict[str, Any]:
        return {"heard": self._heard}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._heard = list(state["heard"])


# Both with 2 workers.


class Downhill(Toy):
    """Worker i moves by -1 or -3 at every step, and its loss is (i + 1) 2^-t."""

    def __init__(self, rank: int) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        self.rank = rank
        with torch.no_grad():
            self.w.zero_()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        slope = (self.w - self.w.detach()).sum() * (1.0 + 2.0 * self.rank)
        return slope + (self.rank + 1) * 2.0**-batch_idx


def downhill(rank: int, steps: int, **options: Any) -> tuple[list[float], EASGDStrategy]:
    module, strategy = Downhill(rank), EASGDStrategy(**options)
    trainer(2, strategy).fit(module, loader(rank, steps))
    return module.w.detach().flatten().tolist(), strategy


def weighted(rank: int) -> list[float]:
    return downhill(rank, 6, algorithm=WeightedMean(1.0 + 2 * rank), tau=2)[0]


def test_a_rule_brings_a_field_of_its_own() -> None:
    """2 steps by equal weights, (1 + 3) / 2 each; then 4 by the weights 1 and 3 of 4."""
    center = -2 * (1 + 3) / 2 - 4 * (1 * 1 + 3 * 3) / 4
    assert run_workers(weighted, workers=2) == [[center] * 6] * 2


def observed(rank: int) -> list[Any]:
    found = []
    for overlap in (True, False):
        weights, strategy = downhill(rank, 10, tau=LongerWhenLow(0.2), overlap=overlap)
        heard = strategy.options.rules.period.schedule.state()["heard"]
        found.append((weights, strategy.telemetry.tau, heard))
    return found


def test_a_schedule_follows_an_observation_of_its_own() -> None:
    """Exchanges after 2, 4 and 6 steps, when what was said after 4 has come; so after 9, and 10."""
    heard = [1.5 * 2.0 ** -(steps - 1) for steps in (2, 4, 6, 9, 10)]
    (behind, awaited), others = run_workers(observed, workers=2)
    assert behind == awaited
    assert [behind, awaited] == others
    assert behind[1:] == (3, heard)


def named_apart(rank: int) -> None:
    downhill(rank, 4, algorithm=WeightedMean(field=f"weight_{rank}"), tau=2)


def test_workers_agree_on_the_names_before_they_train() -> None:
    for outcome in run_workers(named_apart, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "only worker 0 has" in outcome.message
        assert "weight_0" in outcome.message
        assert "weight_1" in outcome.message


# Names.


class Silent(Weight):
    @override
    def announce(self) -> Mapping[str, Any]:
        return {}


def test_what_is_said_is_what_was_named() -> None:
    assert Agreement([Weight(2.0)]).announce() == {"weight": 2.0}
    with pytest.raises(ValueError, match=r"Silent.announce\(\) said \[\]\. .*\['weight'\]"):
        Agreement([Silent(2.0)]).announce()


class Named(WeightedMean):
    """Brings companions with these fields."""

    def __init__(self, *fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.kinds = [
            type(f"Companion{n}", (Companion,), {"fields": f}) for n, f in enumerate(fields)
        ]

    @override
    def companions(self, worker: WorkerView) -> list[Companion]:
        return [kind() for kind in self.kinds]


@pytest.mark.parametrize(
    ("rule", "tau", "message"),
    [
        (Named({"a": int}, {"b": int, "a": int}), 2, r"Companion1.fields\['a'\] is the name of an"),
        (Named({"latest_loss": int}), LongerWhenLow(1.0), r"fields\['latest_loss'\] is the name"),
        (Named({"distance": float}), LongerWhenLow(1.0), r"fields\['distance'\] is the name"),
        (Named({"a": str}), 2, r"fields\['a'\]=<class 'str'> .*Allowed: int, float, bool"),
    ],
)
def test_names_and_kinds_are_checked_where_the_strategy_is_made(
    rule: Rule, tau: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(algorithm=rule, tau=tau)


def test_one_class_of_companions_is_brought_once() -> None:
    with pytest.raises(ValueError, match="LatestLoss, LatestLoss, of which two have one name"):
        EASGDStrategy(tau=LongerWhenLow(1.0), rho=LongerWhenLow(1.0))


def test_headers_hold_what_rule_and_schedules_need() -> None:
    def names(rule: Rule, tau: Any) -> list[str]:
        return list(
            ExchangePolicy(Period(tau), Strength("beta", 0.9), algorithm=rule).require_fields()
        )

    assert names(WeightedMean(), 3) == ["weight"]
    assert names(LeaderSGD(), 3) == ["loss"]
    assert names(EASGD(), lambda step: 3) == []
    durations = ["step_microseconds", "exchange_microseconds", "cost_microseconds"]
    assert names(EASGD(), LongerWhenLow(1.0)) == [*durations, "distance", "size", "latest_loss"]
    spread = ["distance", "size", "variance", "lr"]
    assert names(SMA(), AdaptivePeriod()) == [*durations, *spread, "reset"]
