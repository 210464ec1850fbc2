"""Why a wait failed, in words: who is missing, stuck or late, from what the workers told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_easgd.communication.foreign import quote
from lightning_easgd.communication.progress import Progress

OVER = "over"
"""How a worker ends whose part of the training is over."""
_LONGEST_PLACE = 200


@dataclass(frozen=True)
class Sign:
    """What a worker tells with a sign of life."""

    number: int
    """Rises with every sign."""
    step: int
    place: str
    waits_for: str
    stood: float
    """Seconds since its last progress."""

    @classmethod
    def of(cls, progress: Progress, number: int, stood: float) -> Sign:
        """The next sign of this worker."""
        return cls(number, progress.step, progress.place, progress.waits_for, stood)

    def pack(self) -> str:
        """As text, for the store."""
        return json.dumps([self.number, self.step, self.place, self.waits_for, self.stood])

    @classmethod
    def unpack(cls, text: str) -> Sign | None:
        """The inverse of :meth:`pack`; None if it is no sign."""
        try:
            number, step, place, waits_for, stood = json.loads(text)
            return cls(int(number), int(step), str(place), str(waits_for), float(stood))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None


@dataclass(frozen=True)
class State:
    """What is known of another worker when a wait has failed."""

    ended: str = ""
    """How it ended, as it said itself: :data:`OVER`, or with which error."""
    process: int | None = None
    """The number of its process, if that is gone from this machine."""
    absent: bool = False
    """Whether it never came."""
    silent: float = 0.0
    """Seconds without a sign of life; 0 if there are signs."""
    sign: Sign | None = None
    """The latest."""
    stood: float = 0.0
    """Seconds since its last progress."""

    @property
    def missing(self) -> str:
        """How it is missing, in words; empty if it is there."""
        if self.ended == OVER:
            return "has left, since its part of the training is over"
        if self.ended:
            return f"ended with {quote(self.ended)}"
        if self.process is not None:
            return f"gave no sign of life any more: its process {self.process} is gone (killed?)"
        if self.absent:
            return "did not come, or ended before"
        if self.silent:
            return f"gave no sign of life for {self.silent:.0f} s (killed, stopped or cut off)"
        return ""


def diagnose(states: Mapping[int, State], mine: Progress, rank: int, *, stuck_after: float) -> str:
    """Say who is to blame for a wait that failed.

    Args:
        states: of all other workers.
        mine: of this worker.
        rank: of this worker.
        stuck_after: seconds without progress after which a worker is stuck and not just slow.
    """
    missing = {r: state.missing for r, state in states.items() if state.missing}
    if missing:
        return "; ".join(f"Worker {r} {how}" for r, how in missing.items()) + "."
    signs = {r: (state.sign, state.stood) for r, state in states.items() if state.sign is not None}
    busy = {r: told for r, told in signs.items() if not told[0].waits_for}
    stuck = {r: told for r, told in busy.items() if told[1] >= stuck_after}
    if stuck:
        return " ".join(
            f"Worker {r} is alive but has stood {_where(sign)} for {stood:.0f} s."
            for r, (sign, stood) in stuck.items()
        )
    if busy:
        return "All workers are alive, but one is too late: " + _listing(
            {r: f"gets on, {_where(sign)}" for r, (sign, _) in busy.items()}
        )
    waiting = {r: f"waits for {_shown(sign.waits_for)}" for r, (sign, _) in signs.items()}
    if mine.waits_for:
        waiting[rank] = f"waits for {_shown(mine.waits_for)}"
    return (
        "All workers are alive, but one is too late, or waits for something else, or the network"
        " between them failed: " + _listing(waiting)
    )


def find_late(states: Mapping[int, State]) -> dict[int, str]:
    """Who is waited for, while a wait goes on, and how each of them is, in words.

    Of those that are there and do not wait themselves, they are the ones with the fewest steps:
    where sums travel behind training, others have done their part and go on.

    Args:
        states: of all other workers.
    """
    busy = [s.sign.step for s in states.values() if s.sign is not None and not s.sign.waits_for]
    return {
        rank: _how(state)
        for rank, state in states.items()
        if state.missing
        or (state.sign and not state.sign.waits_for and state.sign.step == min(busy))
    }


def _how(state: State) -> str:
    if not state.missing:
        assert state.sign is not None
        return f"is {_where(state.sign)}"
    return state.missing + (f"; it gave its last {_where(state.sign)}" if state.sign else "")


def _where(sign: Sign) -> str:
    return f"at step {sign.step} ({_shown(sign.place)})"


def _shown(words: str) -> str:
    return quote(words, _LONGEST_PLACE)


def _listing(states: Mapping[int, str]) -> str:
    return "; ".join(f"worker {r} {states[r]}" for r in sorted(states)) + "."
