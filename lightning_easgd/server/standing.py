"""Which of two servers answers workers: a primary, and a standby that may take its place.

    standby:  "I have the center of version v, and heard you at s"  ->  primary
    primary:  a snapshot, the next difference, or nothing new; and its own time s  ->  standby

Both sides here are pure: time is handed in, and messages are values.

[Note: never two] A primary with a standby acknowledges a difference only when the standby has it. A
standby that took over takes no more from its old primary. So that one acknowledges nothing more,
whatever the clocks say. It does not even answer what only reads, by a lease: it runs from the time
s that the standby heard last, and the standby takes over later than that. Clocks need not agree on
the time, only on how long a second is.

[Note: fence] Each primary that takes over has a larger number. Workers carry the largest that they
have met. A server with a smaller one does not answer them, and they take no answer from it.

[Note: a silent standby] The primary cannot tell a standby that ended from one that it cannot reach,
which may have taken over. So it acknowledges nothing until the standby is back. If it never comes
back, a person says so, and the primary goes on alone.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_easgd.server.values import Added, SnapshotError

_FILE = "standing.json"

_MARGIN = 1.25
"""Times the lease: so long a standby waits, for a clock that runs slower than the primary's."""


@dataclass(frozen=True)
class Standing:
    """What a server must know of itself after a restart.

    Args:
        fence: the number of its primary; 0 if none ever took over.
        serves: whether it is the primary.
        standby: the name of the one that may take over; empty: there is none.
        name: of this server, as a standby.
    """

    fence: int = 0
    serves: bool = True
    standby: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


def load_standing(folder: Path) -> Standing:
    """What a folder says; a new one is of a primary.

    Raises:
        SnapshotError: the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return Standing()
    try:
        return Standing(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise SnapshotError(
            f"{path} is damaged ({error}). If no other server of this center is left, remove it."
        ) from error


def save_standing(folder: Path, standing: Standing) -> None:
    """Have it on the disk.

    Raises:
        OSError: it cannot be written.
    """
    path, part = folder / _FILE, folder / f"{_FILE}.part"
    with open(part, "w") as file:
        file.write(json.dumps(asdict(standing)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class NotPrimary(Exception):
    """Another server is to be asked."""


@dataclass
class Primary:
    """A primary's side: what its standby has, and until when that one does not take over.

    Args:
        standing: of the server.
        run: of this process; another one cannot go on with what a standby has.
        lease: seconds.
        keep: has a standing on the disk.
        most_waiting: differences that are held for a standby that is not there yet.
    """

    standing: Standing
    run: str
    lease: float = 5.0
    keep: Callable[[Standing], None] = lambda _: None
    most_waiting: int = 64
    follows: bool = False
    confirmed: int = -1
    promised_until: float = -math.inf
    complete_from: int = 0
    """The version from which on the standby had all that was acknowledged."""
    waiting: deque[Added] = field(default_factory=deque)

    def answers(self, now: float) -> bool:
        """Whether it may answer workers."""
        standing = self.standing
        return standing.serves and (not standing.standby or now < self.promised_until)

    def has_kept(self, version: int) -> bool:
        """Whether a difference may be acknowledged."""
        return not self.standing.standby or version <= self.confirmed

    def add(self, added: Added) -> None:
        """Hold a copy of a difference for the standby, if one follows."""
        if not self.follows:
            return
        self.waiting.append(added.copy())
        if not self.standing.standby and len(self.waiting) > self.most_waiting:
            self.follows = False
            self.waiting.clear()

    def hear(self, asked: dict[str, Any], version: int, now: float) -> None:
        """Take in what a standby has; if it does not follow after that, it needs a snapshot.

        Raises:
            NotPrimary: the standby has more than this server, or this one is none itself.
        """
        have, ours = asked["have"], self.standing
        if not ours.serves or have > version or asked["fence"] > ours.fence:
            raise NotPrimary("This server knows less than the one that would be its standby.")
        if ours.standby not in ("", asked["name"]):
            raise NotPrimary(
                "This server has another standby. If that one has ended, and did not take over,"
                " start this server again with alone=true."
            )
        if asked["run"] != self.run or not self.follows:
            self.follows = False
            return
        while self.waiting and self.waiting[0].receipt.version <= have:
            self.waiting.popleft()
        if not ours.standby:
            self._set(replace(ours, standby=asked["name"]))
            self.complete_from = version
        self.confirmed = max(self.confirmed, have)
        if asked["heard"] is not None:
            heard = min(asked["heard"], now)
            self.promised_until = max(self.promised_until, heard + self.lease)

    def begin(self) -> None:
        """Note that a standby gets a snapshot of the center as it is."""
        self.follows = True
        self.waiting.clear()

    def dismiss(self, name: str) -> None:
        """The standby of this name ends, and will not take over."""
        if name == self.standing.standby:
            self._set(replace(self.standing, standby=""))
            self.follows = False
            self.waiting.clear()

    def take_over(self, fence: int) -> None:
        """Serve in place of a primary that is silent."""
        self._set(replace(self.standing, fence=fence, serves=True, standby=""))

    def _set(self, standing: Standing) -> None:
        self.keep(standing)
        self.standing = standing

    def told(self, now: float) -> dict[str, Any]:
        """What goes with every answer to a standby."""
        return {
            "fence": self.standing.fence,
            "run": self.run,
            "time": now,
            "lease": self.lease,
            "complete": bool(self.standing.standby) and self.confirmed >= self.complete_from,
        }


@dataclass
class Follower:
    """A standby's side: what it has, and when it may take over."""

    name: str
    fence: int = 0
    run: str = ""
    have: int = -1
    heard: float | None = None
    heard_at: float = -math.inf
    lease: float = math.inf
    complete: bool = False

    def asks(self) -> dict[str, Any]:
        """What it says to the primary."""
        return {
            "name": self.name,
            "have": self.have,
            "run": self.run,
            "heard": self.heard,
            "fence": self.fence,
        }

    def hear(self, told: dict[str, Any], have: int, now: float) -> None:
        """Take in an answer, after which it has the center of version ``have``."""
        if told["run"] != self.run:
            self.complete = False
        self.fence, self.run, self.lease = told["fence"], told["run"], told["lease"]
        self.complete = told["complete"] or self.complete
        self.heard, self.heard_at, self.have = told["time"], now, have

    def may_take_over(self, since: float) -> bool:
        """Whether the primary has acknowledged nothing that is not here, and does not any more.

        Args:
            since: when it was asked once more, without an answer.
        """
        return self.complete and since - self.heard_at > _MARGIN * self.lease
