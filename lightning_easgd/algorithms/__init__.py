"""WHAT happens to the weights: pure update rules on flat tensors, one file per family.

Nothing here knows of processes, of Lightning or of time; a rule is a function of tensors and rates.
"""

from typing import Any

from lightning_easgd.algorithms.averaging import Downpour, LocalSGD, MDownpour, PostLocalSGD
from lightning_easgd.algorithms.base import Rule
from lightning_easgd.algorithms.delayed import DelayedSGD
from lightning_easgd.algorithms.elastic import EASGD, SMA
from lightning_easgd.algorithms.leader import LeaderSGD
from lightning_easgd.algorithms.outer import BMUF, DiLoCo, SlowMo
from lightning_easgd.algorithms.running_average import CenterAverage, choose_average

RULES: dict[str, type[Rule]] = {
    "easgd": EASGD,
    "local_sgd": LocalSGD,
    "post_local_sgd": PostLocalSGD,
    "downpour": Downpour,
    "mdownpour": MDownpour,
    "slowmo": SlowMo,
    "bmuf": BMUF,
    "diloco": DiLoCo,
    "sma": SMA,
    "leader_sgd": LeaderSGD,
    "delayed_sgd": DelayedSGD,
}
"""The rules that are known by name."""

AVERAGED: dict[str, dict[str, Any]] = {
    "adownpour": {"algorithm": "downpour", "center_average": "polyak"},
    "mvadownpour": {"algorithm": "downpour", "center_average": "ema"},
}
"""Rules with a running average of the center, by the names that the pairs have."""


def choose_rule(algorithm: str | Rule) -> Rule:
    """The rule that ``algorithm`` names or is.

    Raises:
        ValueError: no rule has this name.
    """
    if isinstance(algorithm, Rule):
        return algorithm
    if isinstance(algorithm, str) and algorithm in RULES:
        return RULES[algorithm]()
    raise ValueError(
        f"algorithm={algorithm!r} is not allowed. Allowed: {', '.join(map(repr, RULES))}, or a"
        " lightning_easgd.Rule with options of its own."
    )


__all__ = [
    "AVERAGED",
    "BMUF",
    "EASGD",
    "RULES",
    "SMA",
    "CenterAverage",
    "DelayedSGD",
    "DiLoCo",
    "Downpour",
    "LeaderSGD",
    "LocalSGD",
    "MDownpour",
    "PostLocalSGD",
    "Rule",
    "SlowMo",
    "choose_average",
    "choose_rule",
]
