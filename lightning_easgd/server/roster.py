"""The workers of a server: who is there, what it last sent, how often it may, whose turn it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_easgd.schedules.even import MOST
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.settings import Settings
from lightning_easgd.server.values import Added, Receipt

_NEW_SPEED = 0.25
"""The part of a new speed in the smoothed one."""

_REMEMBERED = 16
"""Times the workers that may be there at a time: as many are known, with those that are not."""


@dataclass
class Worker:
    """What a server knows of a worker."""

    incarnation: int
    receipt: Receipt
    got: int
    """The version of the center that it last got."""
    samples: float = 0.0
    """Behind its last difference."""
    speed: float = 0.0
    """In steps per second, smoothed; 0 if it is not known."""
    adds: int = 0
    repeated: int = 0
    missing: int = 0
    """Sequences that never came, or that a restart of the server forgot."""
    received: int = 0
    """Bytes of vectors that came from it since the server was started."""
    sent: int = 0
    """Bytes of vectors that it got since then."""
    norm: float = 0.0
    """Of its last difference."""
    last_seen: float = 0.0
    tokens: float = math.inf
    """Messages that it might send at once, at ``tokens_at``."""
    tokens_at: float = 0.0
    left: bool = False

    def note(self, added: Added) -> None:
        """Remember a difference that was added."""
        self.adds += 1
        self.missing += added.receipt.sequence - self.receipt.sequence - 1
        self.norm, self.samples, self.receipt = added.norm, added.samples, added.receipt

    def state(self) -> dict[str, Any]:
        """As plain data, without what has no meaning under another clock or is not kept."""
        kept = asdict(self)
        for name in ("last_seen", "tokens", "tokens_at", "received", "sent"):
            del kept[name]
        return kept

    @classmethod
    def from_state(cls, state: dict[str, Any], now: float) -> Worker:
        """The inverse of :meth:`state`."""
        receipt = Receipt(**state["receipt"])
        return cls(**{**state, "receipt": receipt, "last_seen": now})


class Roster:
    """The table of the workers.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self.workers: dict[str, Worker] = {}
        self._settings = settings
        self._smoothed = 0.0
        self._smoothed_at = 0.0
        self._last_turn: str | None = None

    def join(self, name: str, incarnation: int, *, version: int, now: float) -> Worker:
        """Let a worker in, or know it again.

        Raises:
            Refused: a later process of this name has joined, there are too many workers, or this
                one asks too often.
        """
        known = self.workers.get(name)
        if known is not None and incarnation < known.incarnation:
            raise _replaced(name)
        if known is not None:
            self._take_token(known, now)
        if known is None or incarnation > known.incarnation:
            self._make_room(name, now)
        return self.knows(name, incarnation, got=version, now=now)

    def knows(self, name: str, incarnation: int, *, got: int, now: float) -> Worker:
        """The worker of this name, and a new one if it is of a later process."""
        known = self.workers.get(name)
        if known is None or incarnation > known.incarnation:
            before, known = known, Worker(incarnation, Receipt(0, got, 0, 1.0), got=got)
            if before is not None:
                known.tokens, known.tokens_at = before.tokens, before.tokens_at
            self.workers[name] = known
        known.left, known.last_seen = False, now
        self._follow_live(now)
        return known

    def find(self, name: str, incarnation: int, *, now: float) -> Worker:
        """The worker that speaks.

        Raises:
            Refused: it has not joined, or a later process of its name has.
        """
        known = self.workers.get(name)
        if known is None or known.left or incarnation > known.incarnation:
            raise Refused(
                Refusal.UNKNOWN_WORKER,
                f"The server does not know worker '{name}'. Join first, and again after the server"
                " was restarted.",
            )
        if incarnation < known.incarnation:
            raise _replaced(name)
        known.last_seen = now
        self._follow_live(now)
        return known

    def admit(self, name: str, incarnation: int, *, now: float) -> Worker:
        """As :meth:`find`, for a message that counts against the worker's rate; raises Refused."""
        known = self.find(name, incarnation, now=now)
        self._take_token(known, now)
        return known

    def leave(self, name: str, incarnation: int, *, now: float) -> None:
        """Let a worker go; its turn passes on."""
        self.find(name, incarnation, now=now).left = True

    def live(self, now: float) -> list[str]:
        """The names of the workers that are there, in order."""
        return sorted(name for name, worker in self.workers.items() if self._is_live(worker, now))

    def count(self, now: float) -> float:
        """p, of which α is β/p."""
        if self._settings.workers != "live":
            return float(self._settings.workers)
        self._follow_live(now)
        return max(1.0, self._smoothed)

    def samples_weight(self, name: str, samples: float, *, now: float) -> float:
        """The samples behind a difference, over the mean of the workers that are there."""
        known = [self.workers[other].samples for other in self.live(now) if other != name]
        counts = [samples, *filter(None, known)]
        return samples * len(counts) / sum(counts)

    def hear_speed(self, worker: Worker, speed: float) -> None:
        """Take in how many steps per second a worker says that it takes; 0 if it does not know."""
        if speed:
            worker.speed += (speed - worker.speed) * (_NEW_SPEED if worker.speed else 1)

    def period(self, worker: Worker, *, now: float) -> int:
        """τ of a worker: in proportion to its speed where all are to exchange equally often."""
        mean, settings = self._settings.period, self._settings
        known = [s for name in self.live(now) if (s := self.workers[name].speed)]
        if not settings.even or settings.order != "any" or not worker.speed or not known:
            return mean
        own = mean * worker.speed * len(known) / sum(known)
        return round(min(max(own, mean / MOST, 1), mean * MOST))

    def require_turn(self, name: str, *, now: float) -> None:
        """Check that it is a worker's turn, if they come in turn.

        Raises:
            Refused: it is another's, or workers are missing at the beginning.
        """
        if self._settings.order == "any":
            return
        live = self.live(now)
        if self._last_turn is None and len(live) < self.count(now):
            raise Refused(
                Refusal.WAIT_FOR_TURN,
                f"{len(live)} of {self._settings.workers} workers have joined. Ask again.",
            )
        turn = next((other for other in live if other > (self._last_turn or "")), live[0])
        if turn != name:
            raise Refused(Refusal.WAIT_FOR_TURN, f"It is the turn of worker '{turn}'. Ask again.")

    def pass_turn(self, name: str) -> None:
        """Let the next worker come."""
        self._last_turn = name

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "workers": {name: worker.state() for name, worker in self.workers.items()},
            "smoothed": self._smoothed,
            "last_turn": self._last_turn,
        }

    def load_state(self, state: dict[str, Any], *, now: float) -> None:
        """The inverse of :meth:`state`."""
        self.workers = {name: Worker.from_state(row, now) for name, row in state["workers"].items()}
        self._smoothed, self._smoothed_at = state["smoothed"], now
        self._last_turn = state["last_turn"]

    def _is_live(self, worker: Worker, now: float) -> bool:
        return not worker.left and now - worker.last_seen <= self._settings.lease

    def _follow_live(self, now: float) -> None:
        """Let the smoothed number rise at once with the number of workers, and fall slowly."""
        live = len(self.live(now))
        part = -math.expm1(-max(0.0, now - self._smoothed_at) / self._settings.smoothing)
        fallen = self._smoothed + part * (live - self._smoothed)
        self._smoothed, self._smoothed_at = max(float(live), fallen), now

    def _take_token(self, worker: Worker, now: float) -> None:
        """Count a message against the rate that is allowed to a worker.

        Raises:
            Refused: it sends too many.
        """
        limits = self._settings.limits
        if limits.most_per_second is None:
            return
        earned = (now - worker.tokens_at) * limits.most_per_second
        worker.tokens, worker.tokens_at = min(limits.burst, worker.tokens + earned), now
        if worker.tokens < 1:
            raise Refused(
                Refusal.TOO_FAST,
                f"More than {limits.most_per_second:g} messages per second came from one worker."
                " Take a larger tau, or raise the server's most_per_second.",
            )
        worker.tokens -= 1

    def _make_room(self, name: str, now: float) -> None:
        """Forget those that left first, but no worker that may still ask again.

        Raises:
            Refused: there are as many workers as may be.
        """
        most = self._settings.limits.most_workers
        others = [other for other in self.live(now) if other != name]
        if len(others) < most:
            known = [other for other in self.workers if other != name]
            while len(known) >= _REMEMBERED * most:
                gone = next((other for other in known if self.workers[other].left), None)
                if gone is None:
                    break
                known.remove(gone)
                del self.workers[gone]
            if len(known) < _REMEMBERED * most:
                return
        raise Refused(
            Refusal.TOO_MANY_WORKERS,
            f"{len(others)} workers are there. Allowed: {most}. Raise the server's most_workers.",
        )


def _replaced(name: str) -> Refused:
    return Refused(
        Refusal.REPLACED,
        f"A later process has joined as worker '{name}'. Give each worker a name of its own, or"
        " end this process. If it is the later one, set the clock of its machine.",
    )
