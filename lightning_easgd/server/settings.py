"""What a server is told: the algorithm, how strongly it pulls, and what it allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_easgd.algorithms import RULES, CenterAverage, Rule, choose_average, choose_rule
from lightning_easgd.schedules.checks import (
    is_count,
    is_number,
    require,
    require_choice,
    require_count,
)

ADDING = ("easgd", "downpour", "mdownpour")
"""The rules that need one worker at a time; all others need the mean over the workers."""


@dataclass(frozen=True)
class Limits:
    """What one worker, or all of them, may ask of a server; ``serve.py`` has the same names.

    Args:
        most_workers: that are there at a time.
        most_bytes: of the model, as a flat center.
        most_per_second: messages of one worker that join, read the center or add to it, on
            average; None: as many as come.
        burst: such messages of one worker that may come at once.

    Raises:
        ValueError: one is out of range.
    """

    most_workers: int = 256
    most_bytes: int = 2**36
    most_per_second: float | None = None
    burst: int = 10

    def __post_init__(self) -> None:
        require_count("most_workers", self.most_workers, "workers")
        require_count("most_bytes", self.most_bytes, "bytes")
        require_count("burst", self.burst, "messages")
        _require_positive("most_per_second", self.most_per_second)


@dataclass(frozen=True)
class Settings:
    """How a server moves its center.

    Args:
        algorithm: "easgd", "downpour" or "mdownpour", or such a rule.
        center_average: "polyak" or "ema", or a CenterAverage, which the server keeps. With
            "downpour" these are ADOWNPOUR and MVADOWNPOUR.
        beta: β = pα, in (0, 1).
        workers: p; or "live", the number that is there, which rises at once and falls slowly.
        tau: τ, the steps between two exchanges of a worker; None: 10, or 1 where the rule needs it.
            "even": 10 in the mean, and of each worker in proportion to the steps per second that it
            says, so that all exchange equally often; with order="round_robin" 10 of each.
        staleness: "scale" divides a difference by 1 + staleness.
        weight: "samples" weights a difference by the samples behind it, over their mean.
        order: "round_robin" lets workers come in the order of their names only, so that a run
            repeats bit for bit. It needs a number of ``workers``, for whom it waits at first.
        max_norm: Euclidean norm to which a larger difference is shortened.
        smoothing: seconds in which a live p falls most of the way.
        lease: seconds of silence after which a worker does not count as there.
        shard: which slice of the center this server has, from 0.
        shards: how many servers there are, with a slice each.
        limits: what workers may ask.

    Raises:
        ValueError: one is out of range, or the rule needs all workers at once.
    """

    algorithm: str | Rule = "easgd"
    center_average: str | CenterAverage | None = None
    beta: float = 0.9
    workers: int | Literal["live"] = "live"
    tau: int | Literal["even"] | None = None
    staleness: Literal["none", "scale"] = "none"
    weight: Literal["none", "samples"] = "none"
    order: Literal["any", "round_robin"] = "any"
    max_norm: float | None = None
    smoothing: float = 30.0
    lease: float = 60.0
    shard: int = 0
    shards: int = 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", _require_rule(self.algorithm))
        object.__setattr__(self, "center_average", choose_average(self.center_average))
        inside = is_number(self.beta) and 0 < self.beta < 1
        require("beta", self.beta, "a number in (0, 1)", inside)
        if self.tau is None:
            object.__setattr__(self, "tau", self.rule.default_tau)
        if self.tau != "even":
            require_count("tau", self.tau, "steps, or 'even'")
        if self.workers != "live":
            require_count("workers", self.workers, "workers, or 'live'")
        objection = self.rule.objection(tau=self.tau or self.period, fragments=1, compression=None)
        if objection:
            raise ValueError(objection)
        require_choice("staleness", self.staleness, ("none", "scale"))
        require_choice("weight", self.weight, ("none", "samples"))
        require_choice("order", self.order, ("any", "round_robin"))
        in_turn = self.order == "round_robin"
        require(
            "workers",
            self.workers,
            "with order='round_robin' a number",
            not in_turn or self.workers != "live",
        )
        self._require_shard()
        for name in ("max_norm", "smoothing", "lease"):
            _require_positive(name, getattr(self, name))

    def _require_shard(self) -> None:
        require_count("shards", self.shards, "shards")
        inside = is_count(self.shard, 0) and self.shard < self.shards
        require("shard", self.shard, f"a whole number from 0 to {self.shards - 1}", inside)
        for name, whole in (("max_norm", None), ("staleness", "none"), ("weight", "none")):
            given = getattr(self, name)
            allowed = f"with several shards {whole!r}, since each would weigh its slice by itself"
            require(name, given, allowed, self.shards == 1 or given == whole)

    @property
    def kind(self) -> dict[str, str]:
        """What a snapshot must have in common with its server."""
        rule = type(self.rule)
        return {
            "algorithm": next(name for name, known in RULES.items() if known is rule),
            "average": repr(self.average),
            "shard": f"{self.shard} of {self.shards}",
        }

    @classmethod
    def of(
        cls,
        *,
        algorithm: str,
        options: dict[str, Any],
        average: dict[str, Any] | None,
        **more: Any,
    ) -> Settings:
        """From plain data.

        Args:
            algorithm: the name of the rule.
            options: of the rule, by name.
            average: kind and rate of the average of the center; None: it has none.
            **more: all else.
        """
        chosen = None if average is None else CenterAverage(**average)
        return cls(RULES[algorithm](**options), chosen, **more)

    @property
    def even(self) -> bool:
        """Whether each worker has a period of its own."""
        return self.tau == "even"

    @property
    def period(self) -> int:
        """τ, or the mean of the workers'."""
        return self.tau if isinstance(self.tau, int) else self.rule.default_tau

    @property
    def rule(self) -> Rule:
        """How a difference moves the center."""
        assert isinstance(self.algorithm, Rule)
        return self.algorithm

    @property
    def average(self) -> CenterAverage | None:
        """Of the center; None: it has none."""
        assert not isinstance(self.center_average, str)
        return self.center_average


def _require_rule(algorithm: str | Rule) -> Rule:
    rule = choose_rule(algorithm)
    adds = type(rule) in [RULES[name] for name in ADDING]
    require(
        "algorithm",
        algorithm,
        f"behind a server one of {', '.join(map(repr, ADDING))}, without center_momentum and"
        " without average",
        adds and not rule.average and not rule.center_momentum and not rule.schedules,
    )
    return rule


def _require_positive(name: str, value: float | None) -> None:
    inside = value is None or (is_number(value) and value > 0)
    require(name, value, "a positive number", inside)
