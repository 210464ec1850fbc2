"""A link that exchanges more often than the one of all workers; see tree.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from lightning_easgd.algorithms import EASGD
from lightning_easgd.algorithms.groups import Groups
from lightning_easgd.center.center import Center
from lightning_easgd.communication import AllReduce, Phase
from lightning_easgd.exchange.difference import Participant, Pull, pull_worker
from lightning_easgd.exchange.link import CollectiveLink
from lightning_easgd.exchange.moving_rates import MovingRates
from lightning_easgd.exchange.optimizers import LocalOptimizers
from lightning_easgd.schedules import Period
from lightning_easgd.telemetry import Telemetry


class Level:
    """A link, when it is due, and what it does where workers are idle.

    Args:
        participant: takes the differences, and counts its costs by itself.
        period: of the link; that above is a multiple.
    """

    def __init__(self, participant: Participant, period: Period) -> None:
        self.telemetry = participant.telemetry
        self._link = CollectiveLink(participant)
        self._period = period
        self.set_clock(0)

    def set_clock(self, clock: int) -> None:
        """An exchange began at this step, or training does after so many steps."""
        _, self.next_due = self._period.after(clock)

    def catch_up(self, clock: int) -> None:
        """All workers go on after ``clock`` steps; those of the link took perhaps fewer."""
        _, due = self._period.after(max(0, clock - 1))
        self.next_due = max(self.next_due, due)

    def start(self, clock: int, *, above: Pull | None = None, last: bool = False) -> Pull:
        """Send the participant's difference off.

        Args:
            clock: steps taken.
            above: the pull of an exchange of the link above at this step; None: there is none.
            last: whether no worker goes on after it.

        Returns:
            The pull that is owed now.
        """
        owed = self._pass_on(above)
        mine = self._link.start(clock, last=last)
        self.set_clock(clock)
        return _together(owed, mine)

    def _pass_on(self, above: Pull | None) -> Pull | None:
        """What of the pull above is owed together with that of this link."""
        return above

    def wait(self) -> None:
        """Wait for what is under way, if anything, and move the center.

        Raises:
            ExchangeError: it failed, or the members are out of step.
        """
        self._link.wait()

    def wait_idle(self, clock: int, phase: Phase) -> int | None:
        """Wait until a member begins an exchange, or all are idle.

        Raises:
            ExchangeError: as for :meth:`wait`.
        """
        self.wait()
        self.announce(clock, phase)
        headers = self._link.headers()
        training = [header.clock for header in headers if header.phase is Phase.TRAINING]
        if training:
            return training[0]
        self.wait()
        return None

    def announce(self, clock: int, phase: Phase) -> None:
        """Say that this worker is idle. Nothing is under way."""
        # In groups, members that train have their center pulled before their headers leave; here it
        # is later.
        self._link.announce_idle(clock, phase, compare=False)

    def shadow(self, clock: int, *, above: Pull | None) -> Pull:
        """Take part in the exchange that members began; as :meth:`start`."""
        owed = self._pass_on(above)
        self._link.headers()
        # Anew: since the header left, the link above may have pulled or reset who takes part here.
        mine = self._link.shadow(clock, anew=True)
        self.set_clock(clock)
        return _together(owed, mine)

    def hand_over(self, telemetry: Telemetry, number: int) -> None:
        """Let what was counted be counted there; ``number``: of this level, 0 the uppermost."""
        telemetry.take_over_often(self.telemetry)

    def state(self) -> dict[str, Any]:
        """What the members share and others do not, for a checkpoint."""
        return {}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on with what members saved; all of them must call it.

        Args:
            saved: of :meth:`state`; None if this worker has nothing.
        """


class GroupLevel(Level):
    """The elastic link between one worker, or the center of its group inside, and a group's center.

    Args:
        center: of the group.
        all_reduce: how sums travel between the members.
        groups: period and strength.
        sizes: how many participants each of the groups has.
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
        self._center = center
        self._all_reduce = all_reduce
        reports = all_reduce.participant == 0
        rates = {size: _rates(groups, optimizers, size, reports=reports) for size in sizes}
        participant = Participant(
            center,
            all_reduce,
            optimizers=optimizers,
            rule=EASGD(),
            rates=rates[len(all_reduce.participants)].at,
            telemetry=Telemetry(),
            from_iterate=from_iterate and inside is None,
            may_take_part=lambda: inside is None or inside.healthy,
        )
        super().__init__(participant, groups.period)

    @property
    def healthy(self) -> bool:
        """Whether a participant had finite weights at the latest exchange that has arrived."""
        return self._link.arrivals.healthy

    @override
    def _pass_on(self, above: Pull | None) -> None:
        pull_worker(above or ())  # at once: see tree.py, [Note: levels]

    @override
    def hand_over(self, telemetry: Telemetry, number: int) -> None:
        telemetry.take_over_inside(self.telemetry, number)

    @override
    def state(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            "joined": self._center.main.joined,
            **self._center.values(),
        }

    @override
    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on with what members saved; all of them must call it.

        A member that has nothing starts at the center that others have. If none has, all stay at
        the center above.

        Args:
            saved: of :meth:`state`; None if this worker has nothing.

        Raises:
            ExchangeError: a member left or did not come in time.
        """
        subgroup, what = self._all_reduce.within, "Resuming"
        assert subgroup is not None
        having = [bool(has) for (has,) in subgroup.gather([saved is not None], what)]
        if not any(having):
            return
        state = saved
        if not all(having):
            elements = sum(p.numel() for s in self._center.cohorts for _, p in s.named)
            state, _ = subgroup.broadcast(saved, having.index(True), what, elements=elements)
        assert state is not None
        self._link.arrivals.healthy = state["healthy"]
        self._center.main.join(min(state["joined"], len(self._center.cohorts)))
        self._center.load_values(state["center"])
        if saved is None:
            self._center.overwrite_worker()


def _together(above: Pull | None, mine: Pull) -> Pull:
    if above is None:
        return mine
    return [*above, *mine] if above else []  # without a pull the worker started again as a whole


def _rates(groups: Groups, optimizers: LocalOptimizers, size: int, *, reports: bool) -> MovingRates:
    try:
        return MovingRates(groups.strength, optimizers, workers=size, reports=reports)
    except ValueError as error:
        participants = " group(s)" if groups.inside else ""
        raise ValueError(
            f"Inside a group of {size}{participants}, with {groups}: {error}"
        ) from error
