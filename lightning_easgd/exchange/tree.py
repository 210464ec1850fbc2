"""Links that exchange more often than the one of all workers: in groups, or of some parameters.

[Note: levels] Each level is synchronous EASGD between participants and a center. On top the center
is c, and a participant is the center g of one of the outermost groups; in a group, participants are
the centers of the groups inside it, and in one of the innermost its workers x. Where several levels
exchange at a step, the uppermost goes first: g is pulled towards c at once, and then x and g pull
at each other::

    e = α' (g - c) ;  g <- g - e ;  c <- c + Σ_groups e       every τ' steps
    d = α (x - g)  ;  x <- x - d ;  g <- g + Σ_members d      every τ steps, τ | τ'

The pull on g needs nobody else, so c is first read at the next exchange of the upper level, and g
at the next of the lower one, and both sums travel behind the steps in between with the same bits.
One after the other is a product of symmetric maps. Each has no eigenvalue outside (-1, 1] if its
own α < 2/(p+1), with the p of that level, and then the product is stable too. (All levels at once
would need the sum of their strengths to be small.) Every exchange keeps Σ x + Σ g + c.

[Note: often] Parameters that are exchanged often are a level of their own, too: among all workers,
inside no group, with the same center but other fragments of it. Where both exchange at a step, both
differences are taken before it, and both pulls follow it. A worker whose weights are not finite
starts again as a whole: where both exchange, the main link looks at both portions, and in between
the worker waits for the main sum in flight, so that overlap changes no bit. Every main exchange is
at a step at which small ones are, too.

[Note: headers first] An idle worker learns from its group's headers which exchanges members began
further up. It sends its headers for all of these before it waits for those of others. Idle workers
of other groups need them: they learn of an exchange only when all headers of the level in between
are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_easgd.communication import Phase
from lightning_easgd.exchange.difference import Pull, pull_worker
from lightning_easgd.exchange.level import Level
from lightning_easgd.exchange.seam import Link
from lightning_easgd.telemetry import Telemetry


class Levels:
    """The exchange of all workers on top, and those that are more often, if there are any.

    Args:
        top: of all workers.
        levels: of this worker's groups, from the outermost inward; or that of parameters that are
            exchanged often.
        telemetry: where costs are counted.
    """

    def __init__(self, top: Link, levels: Sequence[Level], telemetry: Telemetry) -> None:
        self.top = top
        self._levels = list(levels)
        self._telemetry = telemetry

    def __bool__(self) -> bool:
        """Whether there are exchanges more often than on top."""
        return bool(self._levels)

    def set_clock(self, clock: int) -> None:
        """Training begins after so many steps."""
        for level in self._levels:
            level.set_clock(clock)

    def catch_up(self, clock: int) -> None:
        """All workers go on after ``clock`` steps, of which this one took perhaps fewer."""
        for level in self._levels:
            level.catch_up(clock)

    def start_due(self, clock: int, pull: Pull | None) -> Pull:
        """Start what is due at this step, level by level; see [Note: levels].

        Args:
            clock: steps taken.
            pull: of an exchange on top at this step; None: there is none.

        Returns:
            What the worker is owed.
        """
        self._wait_for_groups(clock)
        for level in self._due(clock, self._levels):
            pull = level.start(clock, above=pull)
        return pull or []

    def shadow(
        self,
        clock: int,
        phase: Phase,
        announce: Callable[[int, Phase], bool],
        shadow_top: Callable[[int], Pull],
    ) -> Iterator[int]:
        """Shadow the exchanges of members that still train, until none does.

        See [Note: headers first].

        Args:
            clock: steps taken.
            phase: where this worker is idle.
            announce: is given a step, and tells whether all workers exchange at it; if they do, it
                has announced there that this worker is idle.
            shadow_top: takes part in that exchange; returns what the outermost center is owed.

        Yields:
            The step of each exchange, when this worker has taken part.

        Raises:
            ExchangeError: an exchange failed, or members are out of step.
        """
        for number, level in reversed(list(enumerate(self._levels))):
            while (begun := level.wait_idle(clock, phase)) is not None:
                clock = begun
                above = self._due(clock, self._levels[:number])
                for upper in above:
                    upper.wait()
                for_all = announce(clock, phase)
                for upper in above:
                    upper.announce(clock, phase)
                pull = shadow_top(clock) if for_all else None
                for shadowing in [*above, level]:
                    pull = shadowing.shadow(clock, above=pull)
                pull_worker(pull or [])
                yield clock

    def drain(self) -> None:
        """As :meth:`wait`, for something else than the next step."""
        self.wait()
        self.top.timer.interrupt()  # whoever needs the center has something to do with it

    def wait(self) -> None:
        """Wait for all that is under way, and move the centers.

        Raises:
            ExchangeError: it failed, or workers are out of step; the center stays as it was.
            NonFiniteError: no worker had finite weights; the center stays as it was.
        """
        self._wait_for_groups()
        self.top.wait()

    def _wait_for_groups(self, due: float = math.inf) -> None:
        """Wait for what is under way in groups where an exchange is due by then."""
        for number, level in enumerate(self._levels):
            if level.next_due <= due:
                level.wait()
                level.hand_over(self._telemetry, number)

    def finish(self, clock: int) -> None:
        """Let all that workers have reach the center on top, or its other portion."""
        for level in reversed(self._levels):
            level.start(clock, last=True)
            level.wait()

    def state(self) -> list[dict[str, Any]]:
        """What the members of this worker's groups share, for a checkpoint."""
        return [level.state() for level in self._levels]

    def restore(self, saved: Sequence[Mapping[str, Any]] | None) -> None:
        """The inverse of :meth:`state`, on all workers; None: this one has nothing."""
        for number, level in enumerate(self._levels):
            level.restore(saved[number] if saved else None)

    @staticmethod
    def _due(clock: int, levels: Sequence[Level]) -> list[Level]:
        return [level for level in levels if clock >= level.next_due]
