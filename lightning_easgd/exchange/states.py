"""Where a link stands.

[Note: states] A link is free; or an idle worker has sent its header; or an exchange is in flight,
which this worker began, or shadows after its header. Each state is one value that never changes. It
holds all that its arrival needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_easgd.communication import PendingSum
from lightning_easgd.exchange.difference import Contribution, Difference


@dataclass(frozen=True)
class Owed:
    """A worker has to go on from the center, under a rule with a delay."""

    due: int
    """At this step."""
    index: int
    """Of the fragments."""
    joined: int
    """How many cohorts were in the exchange."""


@dataclass(frozen=True)
class Exchanged:
    """The latest exchange that was started."""

    clock: int
    joined: int
    """How many cohorts were in it."""


@dataclass(frozen=True)
class Free:
    """Nothing is under way."""


@dataclass(frozen=True)
class HeaderSent:
    """This worker is idle, and has said so."""

    pending: PendingSum
    cohorts: int
    """Those known then, those that join after the exchange included."""
    difference: Difference


@dataclass(frozen=True)
class InFlight:
    """An exchange that was started, or is shadowed, and not yet applied."""

    pending: PendingSum
    cohorts: int
    """As of HeaderSent."""
    difference: Difference
    contribution: Contribution
    clock: int
    index: int
    """Of the fragments."""
    last: bool = False
    """Whether no worker goes on after it."""
    moves: bool = True
    """Whether the rule moves the center; else what arrives is only added to it."""
    resets: bool = False
    """Whether workers that were pulled go on from the center that it moves."""
