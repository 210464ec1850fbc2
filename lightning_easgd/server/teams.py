"""Workers that were started together: each trains by itself, and they end together.

A worker of a team says with each sign of life how far it is. So nothing here has to be kept when a
server is restarted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from lightning_easgd.server.values import News

MOST_SAVES = 8
"""Checkpoints of which worker 0 tells at a time."""

_GRACE = 120.0
"""Seconds after the first worker of a team in which the last one may join."""


@dataclass
class Team:
    """One team, as its workers told of it."""

    began: float
    finished: dict[str, bool] = field(default_factory=dict)
    """Whether it needs its worker no longer, by name."""
    progress: dict[str, int] = field(default_factory=dict)
    stops: bool = False
    saves: dict[str, str] = field(default_factory=dict)


class Teams:
    """What workers say; the team of worker "run/2" is "run", and a name without "/" is its own."""

    def __init__(self) -> None:
        self._teams: dict[str, Team] = {}

    def hear(
        self,
        worker: str,
        *,
        size: int,
        progress: int,
        finished: bool,
        stops: bool,
        saves: dict[str, str],
        there: Collection[str],
        now: float,
    ) -> News:
        """A worker gives a sign of life.

        Args:
            worker: its name.
            size: how many workers its team has.
            progress: a count that rises while it trains.
            finished: whether it has sent all that it had.
            stops: whether all of the team are to stop.
            saves: as of News; those of worker "run/0" count.
            there: names of the workers that are.
            now: seconds.

        Returns:
            How its team is.
        """
        self._forget(there, besides=worker)
        team = self._teams.setdefault(worker.rpartition("/")[0] or worker, Team(now))
        team.finished[worker], team.progress[worker] = finished, progress
        team.stops |= stops
        if worker.endswith("/0"):
            team.saves = saves
        trains = [name for name, done in team.finished.items() if not done and name in there]
        missing = size - len(team.finished) if now - team.began < _GRACE else 0
        counts = {name: team.progress[name] for name in trains if finished}
        return News(len(trains) + max(0, missing), counts, team.stops, team.saves)

    def _forget(self, there: Collection[str], *, besides: str) -> None:
        """Forget teams of which nobody is there."""
        for name, team in list(self._teams.items()):
            if not any(each in there or each == besides for each in team.finished):
                del self._teams[name]
