"""The small message that travels with every exchange, and what it proves.

Every worker sees every header, in rank order, so all draw the same conclusions: either all go on or
all raise the same error. Nothing else about an exchange is agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum


class ExchangeError(RuntimeError):
    """An exchange failed, or showed that the workers no longer train the same model in step."""


class Stop(IntEnum):
    """Why training should stop; of several, the highest counts."""

    NO = 0
    INTERRUPTED = 1
    """Ctrl-C (SIGINT)."""
    TERMINATED = 2
    """SIGTERM."""


@dataclass(frozen=True)
class Header:
    """What one worker says about itself at an exchange; every field travels as a 64-bit integer."""

    clock: int
    """Optimizer steps taken."""
    fingerprint: int
    """Hash of the names and shapes of the parameters in this exchange."""
    announced: int
    """The same, with parameters that were unfrozen since and join with the next exchange."""
    done: bool
    """This is the worker's last exchange."""
    stop: Stop
    """Why the worker was asked to stop."""
    non_finite: bool
    """The worker's weights are not finite; its difference is left out."""
    checksum: int
    """Of the center's bits, 0 where it is not taken."""
    wait_microseconds: int
    """Time the worker has stood still for exchanges so far."""

    def pack(self) -> list[int]:
        """The fields as integers."""
        return [int(value) for value in astuple(self)]

    @classmethod
    def unpack(cls, values: Sequence[int]) -> Header:
        """The inverse of :meth:`pack`."""
        clock, fingerprint, announced, done, stop, non_finite, checksum, wait = values
        return cls(
            clock, fingerprint, announced, bool(done), Stop(stop), bool(non_finite), checksum, wait
        )


def verify(headers: Sequence[Header]) -> None:
    """Check that all workers met at the same exchange with the same parameters and the same center.

    Args:
        headers: one per worker, in rank order.

    Raises:
        ExchangeError: they did not; the message says which worker holds what.
    """
    _same(
        headers,
        lambda h: f"step {h.clock}" + (", at the end of training" if h.done else ""),
        "Workers met in an exchange at different optimizer steps",
        "All must take the same number of steps: give every worker the same number of batches, and"
        " let nothing that only one worker knows decide tau or when training stops.",
    )
    _same(
        headers,
        lambda h: f"parameter set {h.fingerprint:014x}",
        "Workers hold different sets of trainable parameters",
        "Build, freeze and unfreeze the same parameters on every worker.",
    )
    _same(
        headers,
        lambda h: f"parameter set {h.announced:014x}",
        "Some workers unfroze parameters that others did not",
        "Unfreeze the same parameters at the same step on every worker.",
    )
    _same(
        headers,
        lambda h: f"center checksum {h.checksum:x}",
        "The workers' copies of the center have drifted apart",
        "Resume from the last checkpoint; if this happens again, the hardware or the all-reduce"
        " is faulty.",
    )


def _same(
    headers: Sequence[Header], describe: Callable[[Header], str], problem: str, remedy: str
) -> None:
    seen = [describe(header) for header in headers]
    if len(set(seen)) > 1:
        listing = "; ".join(f"worker {rank}: {text}" for rank, text in enumerate(seen))
        raise ExchangeError(f"{problem} ({listing}). {remedy}")
