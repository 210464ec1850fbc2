"""Elastic Averaging SGD (Zhang et al. 2015, arXiv:1412.6651) as a PyTorch Lightning strategy.

Five questions, five places: WHAT happens to the weights (``algorithms``), WHEN and how strongly
(``schedules``), HOW the bytes move (``communication``), WHERE the shared weights live (``center``),
and one object that asks them in order at every step (``exchange``). ``server`` keeps the center of
workers that come at their own pace. ``strategy`` only plugs all of this into Lightning.

Importing the package registers ``Trainer(strategy="easgd")``, ``easgd_spawn``, ``easgd_fork`` and
``easgd_notebook``, and so the other rules of the family by their names. ``easgd_async``,
``downpour_async`` and others in ``_async`` have their center behind a server.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_easgd.algorithms import (
    BMUF,
    EASGD,
    SMA,
    CenterAverage,
    DelayedSGD,
    DiLoCo,
    Downpour,
    LeaderSGD,
    LocalSGD,
    MDownpour,
    PostLocalSGD,
    Rule,
    SlowMo,
)
from lightning_easgd.algorithms.groups import Groups
from lightning_easgd.communication import Codec, ExchangeError, Int8, TopK
from lightning_easgd.exchange.arrival import NonFiniteError
from lightning_easgd.schedules import (
    AdaptivePeriod,
    Anneal,
    Auto,
    Companion,
    ConsensusTarget,
    Cosine,
    Exponential,
    Linear,
    Often,
    Schedule,
    Steps,
)
from lightning_easgd.strategy.center_at import CenterAt
from lightning_easgd.strategy.monitor import EASGDMonitor
from lightning_easgd.strategy.strategy import EASGDStrategy
from lightning_easgd.telemetry import Telemetry

__all__ = [
    "BMUF",
    "EASGD",
    "SMA",
    "AdaptivePeriod",
    "Anneal",
    "Auto",
    "CenterAt",
    "CenterAverage",
    "Codec",
    "Companion",
    "ConsensusTarget",
    "Cosine",
    "DelayedSGD",
    "DiLoCo",
    "Downpour",
    "EASGDMonitor",
    "EASGDStrategy",
    "ExchangeError",
    "Exponential",
    "Groups",
    "Int8",
    "LeaderSGD",
    "Linear",
    "LocalSGD",
    "MDownpour",
    "NonFiniteError",
    "Often",
    "PostLocalSGD",
    "Rule",
    "Schedule",
    "SlowMo",
    "Steps",
    "Telemetry",
    "TopK",
]

EASGDStrategy.register_strategies(StrategyRegistry)
