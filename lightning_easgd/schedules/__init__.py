"""WHEN workers exchange and how strongly: τ, one of β, α, ρ, and options of rules.

All take a number, a callable of the optimizer steps taken so far that returns the same on every
worker, or a :class:`Schedule`: ``plain`` ones follow the step, ``adaptive`` ones what the workers
observe together.
"""

from lightning_easgd.schedules.adaptive import AdaptivePeriod, ConsensusTarget
from lightning_easgd.schedules.automatic import Auto, Tau
from lightning_easgd.schedules.base import (
    Durations,
    Observation,
    ScalarOrSchedule,
    Schedule,
    Schedules,
    TrainingLength,
)
from lightning_easgd.schedules.checks import is_number
from lightning_easgd.schedules.companion import Companion, Said, WorkerView
from lightning_easgd.schedules.often import Often, require_often
from lightning_easgd.schedules.period import Period
from lightning_easgd.schedules.plain import (
    Anneal,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Steps,
    as_schedule,
)
from lightning_easgd.schedules.strength import Strength

__all__ = [
    "AdaptivePeriod",
    "Anneal",
    "Auto",
    "Companion",
    "ConsensusTarget",
    "Constant",
    "Cosine",
    "Durations",
    "Exponential",
    "Linear",
    "Observation",
    "Often",
    "Period",
    "Said",
    "ScalarOrSchedule",
    "Schedule",
    "Schedules",
    "Steps",
    "Strength",
    "Tau",
    "TrainingLength",
    "WorkerView",
    "as_schedule",
    "is_number",
    "require_often",
]
