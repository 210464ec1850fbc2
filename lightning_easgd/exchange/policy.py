"""What the user asked of exchanges: when, how strongly, from where, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_easgd.algorithms import EASGD, Rule
from lightning_easgd.exchange.agreement import fields_of
from lightning_easgd.exchange.consensus import fields_observed
from lightning_easgd.schedules import Companion, Often, Period, Schedules, Strength, WorkerView

ElasticPoint = Literal["iterate", "parameter"]


@dataclass(frozen=True)
class ExchangePolicy:
    """When to exchange, how strongly, from which point of the worker, and what happens then.

    Under an algorithm that is not elastic there is no strength and no such point.
    """

    period: Period
    strength: Strength
    overlap: bool = True
    elastic_point: ElasticPoint = "iterate"
    algorithm: Rule = field(default_factory=EASGD)
    often: Often | None = None

    @property
    def schedules(self) -> Schedules:
        """Whatever follows training."""
        named = {f"algorithm.{name}": s for name, s in self.algorithm.schedules.items()}
        named["tau"] = self.period.schedule
        if self.algorithm.elastic:
            named[self.strength.kind] = self.strength.schedule
        return Schedules(named)

    def companions(self, worker: WorkerView) -> list[Companion]:
        """What rule and schedules need of the workers besides their maths."""
        return [*self.algorithm.companions(worker), *self.schedules.companions(worker)]

    def require_fields(self) -> dict[str, type]:
        """What workers say in their headers besides what all do, by name; and the kind of each.

        Raises:
            ValueError: two have one name, or one is of no kind that travels.
        """
        return fields_of(self.companions(WorkerView()), fields_observed(self.schedules))
