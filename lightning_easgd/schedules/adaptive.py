"""Schedules that react to how far the workers are apart; see [Note: when schedules react]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from lightning_easgd.schedules.base import Observation, Schedule
from lightning_easgd.schedules.checks import is_number, require, require_count

_GAIN = 0.25
_STEADY = 0.75


class ConsensusTarget(Schedule):
    """The strength that keeps workers at a wanted distance d from the center.

        β <- β · clip((d / target)^(1/4), 1/f, f)      d = sqrt((1/p) Σ_i ‖x^i - c‖²) / ‖c‖

    once in a round, in which every fragment has its turn. The same holds for α. A stronger pull
    brings workers closer. d is known an exchange later, so a larger power than 1/4 would swing
    around the target, and a power of 1 without end. The strength stays in its bounds, and α below
    2/(p+1), where it is stable.

    Close to 2/(p+1) a stronger pull drives workers away, since their mean swings around the center.
    Under noise, d² is proportional to (p-1)/(α (2-α)) + 1/((p+1)α (2 - (p+1)α)). For 2 to 64
    workers three quarters of 2/(p+1) give a d within 14 % of the least one, and 0.99 of it up to
    3.2 times the least.

    Kong et al. 2021, "Consensus control for decentralized deep learning", arXiv:2102.04828, show
    that workers closer than a critical distance lose nothing against full synchrony. Their distance
    is from the mean, and follows the gradient. The controller is our own.

    Args:
        target: wanted distance, a fraction of ‖c‖, above 0; telemetry has ``consensus_distance``.
        start: the strength at first.
        least: the least strength, above 0.
        most: the greatest strength; None: three quarters of what is stable.
        factor: f, the most that a round changes it by, above 1.

    Raises:
        ValueError: a value is out of range.
    """

    of: ClassVar[tuple[str, ...]] = ("beta", "alpha")

    def __init__(
        self,
        target: float,
        start: float = 0.9,
        *,
        least: float = 0.01,
        most: float | None = None,
        factor: float = 1.1,
    ) -> None:
        require("target", target, "a number above 0", is_number(target) and target > 0)
        require("factor", factor, "a number above 1", is_number(factor) and factor > 1)
        require("start", start, "a number", is_number(start))
        require(
            "least",
            least,
            f"a number in (0, start={start!r}]",
            is_number(least) and 0 < least <= start,
        )
        require(
            "most",
            most,
            f"a number of at least start={start!r}, or None",
            most is None or (is_number(most) and most >= start),
        )
        self.target, self.start, self.factor = target, start, factor
        self.least, self.most = least, most
        self._value = start
        self._limit = float("inf") if most is None else most

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self.least, self.start if self.most is None else self.most

    @override
    def at(self, step: int) -> float:
        return min(self._value, self._limit)

    @override
    def limit(self, most: float) -> None:
        self._limit = _STEADY * most if self.most is None else min(self.most, most)

    @override
    def observe(self, seen: Observation) -> bool:
        if seen.distance is not None:
            change = (seen.distance / self.target) ** _GAIN
            change = min(max(change, 1 / self.factor), self.factor)
            self._value = min(max(self._value * change, self.least), self._limit)
        return False

    @override
    def state(self) -> dict[str, Any]:
        return {"value": self._value}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._value = max(state["value"], self.least)


class AdaptivePeriod(Schedule):
    """τ that is small while workers disagree, and grows when they do not.

    V is the variance across workers, (1/p) Σ_i ‖x^i - m‖² with their mean m, and η the learning
    rate. At first τ stays, and C becomes the mean of V / η over ``sample`` rounds. Then, after
    every round::

        V < (1 - δ) η C:  τ <- τ + 1          V > (1 + δ) η C:  τ <- τ - 1

    Jiang, Agrawal 2020, "Adaptive periodic averaging: a practical approach to reducing
    communication in distributed learning", arXiv:2007.06134, who average and take δ = 0.3. Before
    them, Wang, Joshi 2018 let τ follow the loss ("Adaptive communication strategies", AdaComm,
    arXiv:1810.08313). What is ours: C is the mean of a number of rounds, not of a part of training,
    and with fragments τ is rounded to a multiple of them.

    Args:
        start: τ at first, in optimizer steps.
        tau_min: the smallest τ.
        tau_max: the largest τ.
        sample: rounds that C is the mean over.
        tolerance: δ, in [0, 1).

    Raises:
        ValueError: a value is out of range.
    """

    of: ClassVar[tuple[str, ...]] = ("tau",)
    reads_variance: ClassVar[bool] = True

    def __init__(
        self,
        start: int = 4,
        *,
        tau_min: int = 1,
        tau_max: int = 64,
        sample: int = 16,
        tolerance: float = 0.3,
    ) -> None:
        self.start = require_count("start", start, "optimizer steps")
        self.tau_min = require_count("tau_min", tau_min, "optimizer steps")
        self.tau_max = require_count("tau_max", tau_max, "optimizer steps")
        self.sample = require_count("sample", sample, "rounds")
        inside = f"a number from tau_min={tau_min} to tau_max={tau_max}"
        require("start", start, inside, tau_min <= start <= tau_max)
        require(
            "tolerance",
            tolerance,
            "a number in [0, 1)",
            is_number(tolerance) and 0 <= tolerance < 1,
        )
        self.tolerance = tolerance
        self._tau = self.start
        self._sampled = 0
        self._level = 0.0

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return self.tau_min, self.tau_max

    @override
    def at(self, step: int) -> float:
        return self._tau

    @override
    def observe(self, seen: Observation) -> bool:
        if seen.variance is None or seen.lr <= 0:
            return False
        found = seen.variance / seen.lr
        if self._sampled < self.sample:
            self._sampled += 1
            self._level += (found - self._level) / self._sampled
        elif found < (1 - self.tolerance) * self._level:
            self._tau = min(self._tau + 1, self.tau_max)
        elif found > (1 + self.tolerance) * self._level:
            self._tau = max(self._tau - 1, self.tau_min)
        return False

    @override
    def state(self) -> dict[str, Any]:
        return {"tau": self._tau, "sampled": self._sampled, "level": self._level}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        self._tau = min(max(state["tau"], self.tau_min), self.tau_max)
        self._sampled, self._level = state["sampled"], state["level"]
