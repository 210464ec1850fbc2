"""The small message that travels with every exchange, and what it proves.

Every worker sees every header, in rank order, so all draw the same conclusions: either all go on or
all raise the same error. Nothing else about an exchange is agreed on.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, get_type_hints


class ExchangeError(RuntimeError):
    """An exchange failed, or showed that the workers no longer train the same model in step."""


class Stop(IntEnum):
    """Why training should stop; of several, the highest counts."""

    NO = 0
    ENOUGH = 1
    """trainer.should_stop: training ends as if it had reached its last step."""
    TIME = 2
    """A time limit: likewise."""
    INTERRUPTED = 3
    """Ctrl-C (SIGINT)."""
    TERMINATED = 4
    """SIGTERM."""
    PREEMPTED = 5
    """SLURM's signal to save and to requeue the job."""

    @property
    def in_time(self) -> bool:
        """Whether training ends as if it had reached its last step."""
        return self in (Stop.ENOUGH, Stop.TIME)

    @property
    def by_exception(self) -> bool:
        """Whether training is left by an exception."""
        return self > Stop.TIME


class Phase(IntEnum):
    """Where a worker is when it sends a header."""

    TRAINING = 0
    """In a step that begins an exchange; in all other phases the worker is idle."""
    VALIDATION = 1
    """Before a validation."""
    EPOCH_END = 2
    """After the last batch of an epoch."""
    FIT_END = 3
    """After the last epoch."""
    COLLECTIVE = 4
    """Before a decision that Lightning lets all workers take together."""
    STOP = 5
    """Between two batches, about to leave training together with all others."""
    BARRIER = 6
    """Before a collective of Lightning's, as at the following."""
    BROADCAST = 7
    REDUCTION = 8
    GATHERING = 9
    SAVE = 10
    """Before a checkpoint."""

    @property
    def words(self) -> str:
        """For messages."""
        name = self.name.lower().replace("_", " ")
        return f"collective ({name})" if Phase.BARRIER <= self <= Phase.GATHERING else name


@dataclass(frozen=True)
class Header:
    """What one worker says about itself at an exchange; every field travels in 64 bits.

    A fixed core, and fields that rules and schedules name. Workers agree on the names at set-up.
    """

    clock: int
    """Optimizer steps taken."""
    fingerprint: int
    """Hash of the names and shapes of the parameters in this exchange."""
    announced: int
    """The same, with parameters that were unfrozen since and join with the next exchange."""
    phase: Phase
    """Whether the worker begins an exchange; else it is idle and shadows those of others."""
    stop: Stop
    """Why the worker was asked to stop."""
    non_finite: bool
    """The worker's weights are not finite; its difference is left out."""
    checksum: int
    """Of the center's bits, 0 where it is not taken."""
    wait_microseconds: int
    """Time the worker has waited for exchanges so far."""
    named: Mapping[str, int | float | bool] = field(default_factory=dict)
    """What companions of the rule and schedules say, and what schedules observe."""

    @property
    def nbytes(self) -> int:
        """On the wire."""
        return 8 * (len(_CORE) + len(self.named))

    def pack(self) -> list[int]:
        """The fields as integers."""
        values = [*(getattr(self, name) for name in _CORE), *self.named.values()]
        return [_bits(value) if isinstance(value, float) else int(value) for value in values]

    def unpack(self, values: Sequence[int]) -> Header:
        """The header of another worker, who packed it with the named fields that this one has."""
        kinds = [*_CORE.values(), *map(type, self.named.values())]
        read = [_from_bits(kind, value) for kind, value in zip(kinds, values, strict=True)]
        core = dict(zip(_CORE, read, strict=False))
        return Header(**core, named=dict(zip(self.named, read[len(core) :], strict=True)))


_CORE = {name: kind for name, kind in get_type_hints(Header).items() if name != "named"}
"""Names and kinds of the fields that every header has."""


def _bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _from_bits(kind: type, bits: int) -> Any:
    return struct.unpack("<d", struct.pack("<q", bits))[0] if kind is float else kind(bits)


def verify(headers: Sequence[Header], ranks: Sequence[int] | None = None) -> None:
    """Check that all workers met at the same exchange with the same parameters and the same center.

    Args:
        headers: one per worker.
        ranks: of these workers; None: they are all, in rank order.

    Raises:
        ExchangeError: they did not; the message says which worker holds what.
    """
    named = _named(headers, ranks)
    steps = {who: h.clock for who, h in named.items() if h.phase is Phase.TRAINING}
    if len(set(steps.values())) > 1:
        listing = ", ".join(f"{who} at step {step}" for who, step in steps.items())
        raise ExchangeError(
            f"Workers met in an exchange at different optimizer steps ({listing}). Let nothing that"
            " only one worker knows decide tau. Workers may take different numbers of steps for as"
            " many batches where the module overrides optimizer_step or optimizes manually."
        )
    _same(
        {who: f"parameter set {h.fingerprint:014x}" for who, h in named.items()},
        "Workers hold different sets of trainable parameters",
        "Build, freeze and unfreeze the same parameters on every worker.",
    )
    _same(
        {who: f"parameter set {h.announced:014x}" for who, h in named.items()},
        "Some workers unfroze parameters that others did not",
        "Unfreeze the same parameters at the same step on every worker.",
    )
    _same(
        {who: f"center checksum {h.checksum:x}" for who, h in named.items() if h.checksum},
        "The workers' copies of the center have drifted apart",
        "Before the first batch, in on_train_epoch_start or on_train_batch_start, write the same"
        " weights on every worker. Else resume from the last checkpoint; if this happens again, the"
        " hardware or the all-reduce is faulty.",
    )


def verify_phases(headers: Sequence[Header]) -> None:
    """Check that all workers, which are idle, can go on.

    Raises:
        ExchangeError: on all of them, if some wait for the others to validate or to decide
            something with them; the message says who stands where.
    """
    if not {header.phase for header in headers} <= {Phase.EPOCH_END, Phase.FIT_END}:
        _same(
            {who: h.phase.words for who, h in _named(headers).items()},
            "Workers wait for each other at different places",
            f"They have taken {[h.clock for h in headers]} steps. With different numbers of batches"
            " or steps, validate and save at the end of epochs, end by max_epochs, and give every"
            " worker a batch in every epoch. Set trainer.should_stop on all workers, or in a hook"
            " of a batch.",
        )


def _named(headers: Sequence[Header], ranks: Sequence[int] | None = None) -> dict[str, Header]:
    ranks = range(len(headers)) if ranks is None else ranks
    return {f"worker {rank}": header for rank, header in zip(ranks, headers, strict=True)}


def _same(seen: Mapping[str, str], problem: str, remedy: str) -> None:
    if len(set(seen.values())) > 1:
        listing = "; ".join(f"{who}: {what}" for who, what in seen.items())
        raise ExchangeError(f"{problem} ({listing}). {remedy}")
