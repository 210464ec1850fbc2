"""What workers agree on by their headers, besides the exchange itself; see transit.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_easgd.algorithms import Rule
from lightning_easgd.communication import Header
from lightning_easgd.exchange.drops import LearningRateDrops
from lightning_easgd.exchange.leadership import Leadership
from lightning_easgd.exchange.optimizers import LocalOptimizers


class Agreement:
    """What the update rule wants to be agreed on.

    Args:
        rule: says what.
        optimizers: the worker's own.
        participants: ranks of workers that take part in exchanges as one.
    """

    def __init__(
        self, rule: Rule, optimizers: LocalOptimizers, participants: Sequence[Sequence[int]]
    ) -> None:
        self.drops = LearningRateDrops(rule.lr_drop, optimizers)
        self.leadership = Leadership(rule.loss_smoothing, participants)

    def forget(self) -> None:
        """Begin as if there had been no exchange yet."""
        self.drops.forget()
        self.leadership.forget()

    def announce(self) -> dict[str, Any]:
        """What this worker says of it, as fields of a header."""
        return {"restart": self.drops.announce(), "loss": self.leadership.announce()}

    def hear(self, headers: Sequence[Header]) -> None:
        """Draw the conclusion that all others draw too."""
        self.drops.hear(headers)
        self.leadership.hear(headers)

    def shared_state(self) -> dict[str, Any]:
        """What all workers hold alike, for a checkpoint."""
        return {**self.drops.shared_state(), **self.leadership.shared_state()}

    def own_state(self) -> dict[str, Any]:
        """What this worker alone knows, for a checkpoint."""
        return {**self.drops.own_state(), **self.leadership.own_state()}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """The inverse of :meth:`shared_state` and :meth:`own_state`, as far as they are there."""
        self.drops.load_state(shared, own)
        self.leadership.load_state(shared, own)
