"""What an exchange is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_easgd.center.center import Center
from lightning_easgd.communication.progress import Progress
from lightning_easgd.exchange.agreement import Agreement
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.exchange.gradient_averaging import GradientAverage
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.exchange.policy import ExchangePolicy
from lightning_easgd.exchange.rendezvous import Rendezvous
from lightning_easgd.exchange.saved_state import SavedState
from lightning_easgd.exchange.stops import Stops
from lightning_easgd.exchange.tree import Levels
from lightning_easgd.telemetry import Telemetry


@dataclass(frozen=True)
class Parts:
    """Parts that know each other; as assembly.py makes them."""

    center: Center
    clock: Clock
    levels: Levels
    rendezvous: Rendezvous
    policy: ExchangePolicy
    agreement: Agreement
    stops: Stops
    optimizers: LocalOptimizers
    saved: SavedState
    telemetry: Telemetry
    progress: Progress
    """Of this worker, which the others are told."""
    gradients: GradientAverage | None = None
    """Averages those of this worker with others'; None: nothing does."""
