"""Why a server does not do what it was asked."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """The reasons; they travel by their values."""

    WAIT_FOR_TURN = "wait_for_turn"
    TOO_FAST = "too_fast"
    NO_CENTER = "no_center"
    UNKNOWN_WORKER = "unknown_worker"
    REPLACED = "replaced"
    SUPERSEDED = "superseded"
    NOT_KEPT = "not_kept"
    TOO_MANY_WORKERS = "too_many_workers"
    OTHER_MODEL = "other_model"
    OTHER_SHARD = "other_shard"
    NOT_FINITE = "not_finite"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    OTHER_PROTOCOL = "other_protocol"

    @property
    def ends(self) -> bool:
        """Whether asking again cannot help."""
        return self not in (Refusal.WAIT_FOR_TURN, Refusal.TOO_FAST, Refusal.NOT_KEPT)


class Refused(Exception):
    """A refusal, with what was given, what is allowed and what to do next."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def malformed(name: str, value: object, allowed: str) -> Refused:
    """The refusal of a value in a message."""
    return Refused(Refusal.MALFORMED, f"{name}={value!r:.80} is not allowed. Allowed: {allowed}.")
