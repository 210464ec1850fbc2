"""Which workers form a group: as the user says it, and as ranks once the workers are known.

Members of a group average their gradients, or are tied to a center of the group's own; see Groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_easgd.schedules import Auto, Period, Schedule, Strength
from lightning_easgd.schedules.checks import is_count

Members = int | Literal["node"] | Sequence[Sequence[int]]

_ALLOWED = (
    "Allowed: a number of workers that each group has, 'node' for the workers of each machine, or"
    " lists of ranks with every rank once, for example [[0, 1], [2, 3]]."
)


@dataclass(frozen=True)
class Groups:
    """Groups with centers of their own: a level of a tree, and perhaps those inside it.

    Every ``tau`` steps a worker x and the center g of its group pull at each other, as worker and
    center do under EASGD; every τ steps of the strategy the groups' centers and the center c do.
    That is Tree EASGD (S. Zhang, "Distributed stochastic optimization for deep learning", thesis,
    NYU 2016) in synchronous form. With ``inside`` there is one more level: smaller groups, whose
    centers are tied to g where their workers would be; and so on.

    Args:
        members: a number of workers that each group has, "node", or lists of ranks. Inside other
            groups, a number and "node" part each of these by itself.
        tau: period inside a group, in optimizer steps; that of the level above is a multiple.
        beta: β inside, in (0, 2), for as many participants as the group has: workers, or groups.
        alpha: α inside, in [0, 2/(participants + 1)).
        rho: ρ inside; α is ηρ. At most one of beta, alpha and rho is given; none: β = 0.9.
        inside: smaller groups, each wholly within one of these; None: workers.

    Raises:
        ValueError: one is out of range, or the groups inside are not within these.
    """

    members: Members
    tau: int = 1
    beta: float | None = None
    alpha: float | None = None
    rho: float | None = None
    inside: Groups | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before the workers are known."""
        members = require_groups(self.members)
        if members is None:
            raise ValueError(
                f"Groups({self.members!r}) does not name groups of workers. {_ALLOWED}"
            )
        object.__setattr__(self, "members", members)
        for name in ("tau", "beta", "alpha", "rho"):
            value = getattr(self, name)
            if (
                callable(value)
                or isinstance(value, Schedule)
                or (name == "tau" and Auto.of(value) is not None)
            ):
                raise ValueError(
                    f"Groups({name}={value!r}) is not possible: inside groups that have centers of"
                    f" their own {name} cannot change while training goes on. Give it a number."
                )
        _ = self.period, self.strength
        if self.inside is not None:
            self._require_inside(self.inside)

    @property
    def period(self) -> Period:
        """τ inside."""
        return Period(self.tau)

    @property
    def strength(self) -> Strength:
        """β, α or ρ inside."""
        return Strength.choose(beta=self.beta, alpha=self.alpha, rho=self.rho)

    @property
    def levels(self) -> list[Groups]:
        """These groups and those inside, from the outermost inward."""
        return [self, *(self.inside.levels if self.inside else [])]

    def require_multiple(self, tau: int | float) -> None:
        """Check the period of the level above.

        Raises:
            ValueError: it is not a multiple of that inside these groups.
        """
        if tau % self.tau:
            raise ValueError(
                f"tau={tau} is not a multiple of the tau={self.tau} inside groups: their centers"
                " exchange when their members do. Allowed: a multiple, for example"
                f" tau={self.tau * max(1, round(tau / self.tau))}."
            )

    def _require_inside(self, inside: Groups) -> None:
        if not isinstance(inside, Groups):
            raise ValueError(
                f"Groups(inside={inside!r}) is not possible: smaller groups have centers of their"
                f" own, too. Give inside=Groups({inside!r}, tau=...), or None."
            )
        inside.require_multiple(self.tau)
        if self.rho is not None:
            raise ValueError(
                f"Groups(rho={self.rho}) is not possible with groups inside: their centers have no"
                " learning rate. Give beta or alpha, or rho to the innermost groups."
            )
        members = [groups.members for groups in self.levels]
        if "node" not in members:
            lists = [sum(map(len, part)) for part in members if not isinstance(part, int | str)]
            workers = max(lists) if lists else members[0]
            assert isinstance(workers, int)
            arrange_levels(self, [0] * workers)


def require_groups(groups: object) -> Members | None:
    """Check what can be checked before the workers are known.

    Raises:
        ValueError: it is no way to name groups.
    """
    if groups is None or groups == "node":
        return groups
    if is_count(groups):
        return int(groups)
    if isinstance(groups, Sequence) and not isinstance(groups, str) and groups:
        lists = [_ranks(part) for part in groups]
        ranks = [rank for part in lists for rank in part]
        if all(lists) and len(set(ranks)) == len(ranks):
            return lists
    raise ValueError(f"groups={groups!r} does not name groups of workers. {_ALLOWED}")


def arrange_levels(groups: Groups | Members | None, nodes: Sequence[int]) -> list[list[list[int]]]:
    """The groups of each level as of :func:`arrange`, from the outermost inward.

    Args:
        groups: with centers of their own or without; None: there are none.
        nodes: the machine that each worker is on, in rank order.

    Raises:
        ValueError: groups do not cover these workers, or are not within those around them.
    """
    if not isinstance(groups, Groups):
        return [arranged] if (arranged := arrange(groups, nodes)) else []
    levels: list[list[list[int]]] = []
    for level in groups.levels:
        levels.append(arrange(level.members, nodes, levels[-1] if levels else None))
    return levels


def arrange(
    groups: Members | None, nodes: Sequence[int], within: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """The ranks of each group in ascending order, the group of the lowest rank first.

    Args:
        groups: as the user gave it; None: there are none.
        nodes: the machine that each worker is on, in rank order.
        within: the ranks of larger groups; None: there are none.

    Raises:
        ValueError: the groups do not cover these workers, or one is not within a larger one.
    """
    workers = list(range(len(nodes)))
    if groups is None:
        return []
    if isinstance(groups, int | str):
        return sorted(part for ranks in within or [workers] for part in _cut(groups, ranks, nodes))
    lists = sorted(sorted(part) for part in groups)
    if sorted(rank for part in lists for rank in part) != workers:
        raise ValueError(
            f"groups={groups!r} does not hold every rank from 0 to {len(nodes) - 1} once, which"
            f" {len(nodes)} worker(s) have. {_ALLOWED}"
        )
    for part in lists:
        parted = [list(ranks) for ranks in within or [workers] if {*part} & {*ranks}]
        if len(parted) > 1:
            raise ValueError(
                f"The group {part} is not within one of the groups around it: its workers are in"
                f" {' and '.join(map(str, parted))}. Allowed inside groups: smaller ones, each"
                " wholly within one of them."
            )
    return lists


def _cut(
    groups: int | Literal["node"], ranks: Sequence[int], nodes: Sequence[int]
) -> list[list[int]]:
    """Parts of ``ranks``: as many workers each, or those of each machine."""
    if groups == "node":
        machines = dict.fromkeys(nodes[rank] for rank in ranks)
        return [[rank for rank in ranks if nodes[rank] == node] for node in machines]
    if len(ranks) % groups:
        whole = len(ranks) == len(nodes)
        raise ValueError(
            f"groups={groups} does not divide the {len(ranks)} workers"
            f"{'' if whole else f' {list(ranks)} of a group'}. Allowed: a divisor, or lists of"
            " ranks, which need not be equally long."
        )
    return [list(ranks[at : at + groups]) for at in range(0, len(ranks), groups)]


def _ranks(part: object) -> list[int]:
    if not isinstance(part, Sequence) or isinstance(part, str):
        return []
    ranks = [int(rank) for rank in part if is_count(rank, least=0)]
    return ranks if len(ranks) == len(part) else []
