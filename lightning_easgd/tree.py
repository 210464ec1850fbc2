"""The lower levels of a tree: workers, and groups of them, tied to centers of groups.

[Note: levels] Each level is synchronous EASGD between parties and a center. On top the center is c,
and a party is the center g of one of the outermost groups; in a group, parties are the centers of
the groups inside it, and in one of the innermost its workers x. Where several levels exchange at a
step, the uppermost goes first: g is pulled towards c at once, and then x and g pull at each other::

    e = α' (g - c) ;  g <- g - e ;  c <- c + Σ_groups e       every τ' steps
    d = α (x - g)  ;  x <- x - d ;  g <- g + Σ_members d      every τ steps, τ | τ'

The pull on g needs nobody else, so c is first read at the next exchange of the upper level, and g
at the next of the lower one, and both sums travel behind the steps in between with the same bits.
One after the other is a product of symmetric maps. Each has no eigenvalue outside (-1, 1] if its
own α < 2/(p+1), with the p of that level, and then the product is stable too. (All levels at once
would need the sum of their strengths to be small.) Every exchange keeps Σ x + Σ g + c.

[Note: headers first] Who stands still in a group learns from its headers of exchanges that members
began further up. It sends its headers for all of these before it waits for those of others: who
stands still in another group learns of them only when all headers of a level in between are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_easgd.agreement import Agreement
from lightning_easgd.algorithms import EASGD
from lightning_easgd.center import Center
from lightning_easgd.communication import AllReduce, Place
from lightning_easgd.contribution import Contribution, Pull, pull_worker
from lightning_easgd.groups import Groups
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.rates import MovingRates
from lightning_easgd.schedules import Schedules
from lightning_easgd.telemetry import Telemetry
from lightning_easgd.transit import Transit


class GroupLevel:
    """The elastic link between one worker, or the center of its group inside, and a group's center.

    Args:
        center: of the group.
        all_reduce: how sums travel between the members.
        groups: period and strength.
        sizes: how many parties each of the groups has.
        inside: the level whose center takes part here; None: the worker itself does.
        optimizers: the worker's own.
        from_iterate: whether x is the paper's iterate where a parameter is its look-ahead point.

    Raises:
        ValueError: on all workers, if the strength is unstable in one of the groups.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: AllReduce,
        groups: Groups,
        *,
        sizes: Sequence[int],
        inside: GroupLevel | None,
        optimizers: LocalOptimizers,
        from_iterate: bool,
    ) -> None:
        self.telemetry = Telemetry()
        self._center = center
        self._all_reduce = all_reduce
        self._inside = inside
        self._period = groups.period
        speaks = all_reduce.party == 0
        rates = {size: _rates(groups, optimizers, size, speaks=speaks) for size in sizes}
        rule = EASGD()
        contribution = Contribution(
            center,
            optimizers,
            rule=rule,
            weights=rates[len(all_reduce.parties)].at,
            telemetry=self.telemetry,
            round_=all_reduce.round_,
            agree=self._agree,
            from_iterate=from_iterate and inside is None,
        )
        self._transit = Transit(
            center,
            all_reduce,
            contribution,
            rule=rule,
            telemetry=self.telemetry,
            agreement=Agreement(rule, optimizers, all_reduce.parties),
            schedules=Schedules({}),
        )
        self.set_clock(0)

    @property
    def healthy(self) -> bool:
        """Whether a party had finite weights at the latest exchange that has arrived."""
        return self._transit.anybody_healthy

    def _agree(self, healthy: bool, checksum: Callable[[], int]) -> bool:
        """Whether a group inside takes part: members know it alike, from its own exchanges."""
        return healthy and (self._inside is None or self._inside.healthy)

    def set_clock(self, clock: int) -> None:
        """An exchange began at this step, or training does after so many steps."""
        _, self.next_due = self._period.after(clock)

    def catch_up(self, clock: int) -> None:
        """All workers go on after ``clock`` steps; those of the group took perhaps fewer."""
        _, due = self._period.after(max(0, clock - 1))
        self.next_due = max(self.next_due, due)

    def begin(self, clock: int, *, last: bool = False) -> Pull:
        """Send the party's difference off; it is owed the returned pull. Nothing is under way."""
        pull = self._transit.begin(clock, last=last)
        self.set_clock(clock)
        return pull

    def land(self) -> None:
        """Wait for what is under way, if anything, and move the group's center.

        Raises:
            ExchangeError: it failed, or the members are out of step.
        """
        self._transit.land()

    def stand_still(self, clock: int, place: Place) -> int | None:
        """Wait until a member begins an exchange, at the step returned, or all stand still.

        Raises:
            ExchangeError: as for :meth:`land`.
        """
        self.land()
        self.announce(clock, place)
        headers = self._transit.headers()
        training = [header.clock for header in headers if header.place is Place.TRAINING]
        if training:
            return training[0]
        self.land()
        return None

    def announce(self, clock: int, place: Place) -> None:
        """Say that this worker stands still. Nothing is under way."""
        # Members that train have their center pulled before their headers leave; here it is later.
        self._transit.stand_still(clock, place, compare=False)

    def answer(self, clock: int) -> Pull:
        """Take part in the exchange that members began, when all have said so; as :meth:`begin`."""
        self._transit.headers()
        # Once more: the group's center may have been pulled since the header left.
        self._transit.contribution.take_differences(0)
        pull = self._transit.answer(clock)
        self.set_clock(clock)
        return pull

    def state(self) -> dict[str, Any]:
        """What the members share, for a checkpoint."""
        return {"healthy": self.healthy, "joined": self._center.joined, **self._center.values()}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on with what members saved; all of them must call it.

        A member that has nothing starts at the center that others have. If none has, all stay at
        the center above.

        Args:
            saved: of :meth:`state`; None if this worker has nothing.

        Raises:
            ExchangeError: a member left or did not come in time.
        """
        island, what = self._all_reduce.within, "Resuming"
        assert island is not None
        having = [bool(has) for (has,) in island.gather([saved is not None], what)]
        if not any(having):
            return
        state = saved
        if not all(having):
            state, _ = island.broadcast(saved, having.index(True), what)
        assert state is not None
        self._transit.anybody_healthy = state["healthy"]
        self._center.join(min(state["joined"], len(self._center.segments)))
        self._center.load_values(state["center"])
        if saved is None:
            self._center.overwrite_worker()


class Levels:
    """All levels of groups with centers of their own; there may be none.

    Args:
        levels: of this worker, from the outermost inward.
        telemetry: where costs are counted.
    """

    def __init__(self, levels: Sequence[GroupLevel], telemetry: Telemetry) -> None:
        self._levels = list(levels)
        self._telemetry = telemetry
        telemetry.bytes_of_groups = [0 for _ in levels]

    def __len__(self) -> int:
        return len(self._levels)

    @property
    def healthy(self) -> bool:
        """Whether the outermost center, if there is one, takes part in exchanges above."""
        return not self._levels or self._levels[0].healthy

    def set_clock(self, clock: int) -> None:
        """Training begins after so many steps."""
        for level in self._levels:
            level.set_clock(clock)

    def catch_up(self, clock: int) -> None:
        """All workers go on after ``clock`` steps, of which this one took perhaps fewer."""
        for level in self._levels:
            level.catch_up(clock)

    def begin_due(self, clock: int, pull: Pull) -> Pull:
        """Begin what is due at this step, level by level; see [Note: levels].

        Args:
            clock: steps taken.
            pull: what the outermost center is owed.

        Returns:
            What the worker is owed.
        """
        self.land(clock)
        for level in self._due(clock, self._levels):
            pull_worker(pull)
            pull = level.begin(clock)
        return pull

    def accompany(
        self,
        clock: int,
        place: Place,
        announce: Callable[[int, Place], bool],
        answer: Callable[[int], Pull],
    ) -> Iterator[int]:
        """Answer the exchanges of members that still train, until none does.

        See [Note: headers first].

        Args:
            clock: steps taken.
            place: where this worker stands still.
            announce: says so where all workers exchange, if they do at a step; whether they do.
            answer: takes part there, then; what the outermost center is owed.

        Yields:
            The step of each, when it is answered.

        Raises:
            ExchangeError: an exchange failed, or members are out of step.
        """
        for number, level in reversed(list(enumerate(self._levels))):
            while (begun := level.stand_still(clock, place)) is not None:
                clock = begun
                above = self._due(clock, self._levels[:number])
                for upper in above:
                    upper.land()
                for_all = announce(clock, place)
                for upper in above:
                    upper.announce(clock, place)
                pull = answer(clock) if for_all else []
                for answering in [*above, level]:
                    pull_worker(pull)
                    pull = answering.answer(clock)
                pull_worker(pull)
                yield clock

    def land(self, due: float = math.inf) -> None:
        """Wait for what is under way where an exchange is due by then; as of GroupLevel."""
        for number, level in enumerate(self._levels):
            if level.next_due <= due:
                level.land()
                self._telemetry.take_over(level.telemetry, number)

    def finish(self, clock: int) -> None:
        """Let all that workers have reach the outermost center, where it is at the end."""
        for level in reversed(self._levels):
            level.begin(clock, last=True)
            level.land()

    def state(self) -> list[dict[str, Any]]:
        """What the members of this worker's groups share, for a checkpoint."""
        return [level.state() for level in self._levels]

    def restore(self, saved: Sequence[Mapping[str, Any]] | None) -> None:
        """The inverse of :meth:`state`, on all workers; None: this one has nothing."""
        for number, level in enumerate(self._levels):
            level.restore(saved[number] if saved else None)

    @staticmethod
    def _due(clock: int, levels: Sequence[GroupLevel]) -> list[GroupLevel]:
        return [level for level in levels if clock >= level.next_due]


def _rates(groups: Groups, optimizers: LocalOptimizers, size: int, *, speaks: bool) -> MovingRates:
    try:
        return MovingRates(groups.strength, optimizers, workers=size, speaks=speaks)
    except ValueError as error:
        parties = " groups" if groups.inside else ""
        raise ValueError(f"Inside a group of {size}{parties}, with {groups}: {error}") from error
