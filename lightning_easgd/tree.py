"""The lower level of a tree: workers of one group, tied to a center of the group's own.

[Note: levels] Each level is synchronous EASGD: workers x and the center g of their group, and the
groups' centers g and the center c. Where both levels exchange at a step, the upper one goes first:
g is pulled towards c at once, and then x and g pull at each other::

    e = α' (g - c) ;  g <- g - e ;  c <- c + Σ_groups e       every τ' steps
    d = α (x - g)  ;  x <- x - d ;  g <- g + Σ_members d      every τ steps, τ | τ'

The pull on g needs nobody else, so c is first read at the next exchange of the upper level, and g
at the next of the lower one, and both sums travel behind the steps in between with the same bits.
One after the other is a product of two symmetric maps. Each has no eigenvalue outside (-1, 1] if
its own α < 2/(p+1), with the p of that level, and then the product is stable too. (Both levels at
once would need the sum of their strengths to be small.) Every exchange keeps Σ x + Σ g + c.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_easgd.agreement import Agreement
from lightning_easgd.algorithms import EASGD
from lightning_easgd.center import Center
from lightning_easgd.communication import InsideAllReduce, Place
from lightning_easgd.contribution import Contribution, Pull
from lightning_easgd.groups import Groups
from lightning_easgd.optimizers import LocalOptimizers
from lightning_easgd.rates import MovingRates
from lightning_easgd.schedules import Schedules
from lightning_easgd.telemetry import Telemetry
from lightning_easgd.transit import Transit


class GroupLevel:
    """The elastic link between one worker and the center of its group.

    Args:
        center: of the group.
        all_reduce: how sums travel between the members.
        groups: period and strength.
        sizes: how many workers each of the groups has.
        optimizers: the worker's own.
        from_iterate: whether x is the paper's iterate where a parameter is its look-ahead point.
        telemetry: where costs are counted.

    Raises:
        ValueError: on all workers, if the strength is unstable in one of the groups.
    """

    def __init__(
        self,
        center: Center,
        all_reduce: InsideAllReduce,
        groups: Groups,
        *,
        sizes: Sequence[int],
        optimizers: LocalOptimizers,
        from_iterate: bool,
        telemetry: Telemetry,
    ) -> None:
        self._telemetry, self._inside = telemetry, Telemetry()
        self._period = groups.period
        rates = {size: _rates(groups, optimizers, size, all_reduce.party) for size in sizes}
        rule = EASGD()
        contribution = Contribution(
            center,
            optimizers,
            rule=rule,
            weights=rates[all_reduce.level.size].at,
            telemetry=self._inside,
            round_=all_reduce.round_,
            agree=all_reduce.agree,
            from_iterate=from_iterate,
        )
        self._transit = Transit(
            center,
            all_reduce,
            contribution,
            rule=rule,
            telemetry=self._inside,
            agreement=Agreement(rule, optimizers, all_reduce.parties),
            schedules=Schedules({}),
        )
        self.set_clock(0)

    @property
    def healthy(self) -> bool:
        """Whether a member had finite weights at the latest exchange that has arrived."""
        return self._transit.anybody_healthy

    def set_clock(self, clock: int) -> None:
        """An exchange began at this step, or training does after so many steps."""
        _, self.next_due = self._period.after(clock)

    def begin(self, clock: int, *, last: bool = False) -> Pull:
        """Send x - g off; the caller owes the worker the returned pull. Nothing is under way."""
        pull = self._transit.begin(clock, last=last)
        self.set_clock(clock)
        return pull

    def land(self) -> None:
        """Wait for what is under way, if anything, and move the group's center.

        Raises:
            ExchangeError: it failed, or the members are out of step.
        """
        self._transit.land()
        self._telemetry.take_over(self._inside)

    def stand_still(self, clock: int, place: Place) -> int | None:
        """Wait until a member begins an exchange, at the step returned, or all stand still.

        Raises:
            ExchangeError: as for :meth:`land`.
        """
        self.land()
        # Members that train have their center pulled before their headers leave; here it is later.
        headers = self._transit.stand_still(clock, place, compare=False)
        training = [header.clock for header in headers if header.place is Place.TRAINING]
        if training:
            return training[0]
        self.land()
        return None

    def answer(self, clock: int) -> Pull:
        """Take part in the exchange that members began; as :meth:`begin`."""
        # Once more: the group's center may have been pulled since the header left.
        self._transit.contribution.take_differences(0)
        pull = self._transit.answer(clock)
        self.set_clock(clock)
        return pull


def _rates(groups: Groups, optimizers: LocalOptimizers, size: int, place: int) -> MovingRates:
    try:
        return MovingRates(groups.strength, optimizers, workers=size, speaks=place == 0)
    except ValueError as error:
        raise ValueError(f"Inside a group of {size}, with {groups}: {error}") from error
