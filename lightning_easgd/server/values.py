"""What a server answers, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor

from lightning_easgd.center.flat import FlatVector


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
        options: of the rule, by name.
        average: kind and rate of the average of the center that is delivered; None: there is none.
        tau: τ, the steps between two exchanges.
        even: whether the server tells each worker another τ later.
        alpha: α; 1 under a rule whose workers restart at the center.
        version: of the center.
        sequence: of the last difference of this incarnation that was added; 0 if none was.
        has_center: whether the server has a center. If not, join with weights that shall be it.
        began: whether the center began as what this incarnation brought, as far as is known.
    """

    algorithm: str
    options: dict[str, Any]
    average: dict[str, Any] | None
    tau: int
    even: bool
    alpha: float
    version: int
    sequence: int
    has_center: bool
    began: bool = False


@dataclass(frozen=True)
class News:
    """What a worker hears of those that were started with it.

    Args:
        training: how many still train, or may come.
        progress: how far each of these is that has come, by name: a count that rises. Only one that
            has finished hears of it.
        stop: whether this worker is to stop.
        saves: names of the newest checkpoints of worker 0, and the ids of these saves. They come
            from elsewhere, so whoever takes one for a path looks at it first.
    """

    training: int
    progress: dict[str, int]
    stop: bool
    saves: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """A difference with what became of it: whoever has these in order has the center.

    Args:
        worker: its name.
        incarnation: of its process.
        receipt: for it.
        norm: of the difference as it came.
        samples: behind it.
        got: the version of the center that its worker had last got.
        difference: with the receipt's weight in it.
        buffers: how many elements of each precision, at the end, are of buffers.
    """

    worker: str
    incarnation: int
    receipt: Receipt
    norm: float
    samples: float
    got: int
    difference: FlatVector
    buffers: Mapping[str, int] = field(default_factory=dict)

    def copy(self) -> Added:
        """With memory of its own."""
        return replace(self, difference=self.difference.clone())

    def text(self) -> dict[str, Any]:
        """As plain data, but for the difference."""
        facts = {each.name: getattr(self, each.name) for each in fields(self)}
        del facts["difference"]
        return {**facts, "receipt": asdict(self.receipt)}

    @classmethod
    def from_text(cls, text: dict[str, Any], difference: FlatVector) -> Added:
        """The inverse of :meth:`text`."""
        return cls(**{**text, "receipt": Receipt(**text["receipt"])}, difference=difference)


@dataclass(frozen=True)
class Snapshot:
    """A server at one moment: tensors with memory of their own, and plain data."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Keeper(Protocol):
    """Keeps what must not be lost before anybody hears that it was added."""

    def begin(self, snapshot: Snapshot) -> None:
        """Keep a first center; may refuse it."""

    def add(self, added: Added) -> None:
        """Keep a difference, which is added next; may refuse it, and does not change it."""


class SnapshotError(Exception):
    """A snapshot cannot be restored."""
