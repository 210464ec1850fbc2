"""What a server answers, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Receipt:
    """What became of a difference; kept, so that a retry gets the same.

    Args:
        sequence: of the difference.
        version: of the center with it.
        staleness: versions between the center that the worker last got and the difference.
        weight: by which the server multiplied it. A worker that is pulled by as much of its
            difference leaves Σ x + c as it was.
    """

    sequence: int
    version: int
    staleness: int
    weight: float


@dataclass(frozen=True)
class Terms:
    """What a worker takes from the server.

    Args:
        algorithm: the name of the rule.
        tau: τ, the steps between two exchanges.
        alpha: α; 1 under a rule whose workers restart at the center.
        version: of the center.
        sequence: of the last difference of this incarnation that was added; 0 if none was.
        has_center: whether the server has a center. If not, join with weights that shall be it.
    """

    algorithm: str
    tau: int
    alpha: float
    version: int
    sequence: int
    has_center: bool


@dataclass(frozen=True)
class Snapshot:
    """A server at one moment: tensors with memory of their own, and plain data."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class SnapshotError(Exception):
    """A snapshot cannot be restored."""
