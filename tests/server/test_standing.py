"""Two servers and never two primaries: all orders in which things may happen, up to a depth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from lightning_easgd.server import SnapshotError
from lightning_easgd.server.standing import (
    Follower,
    NotPrimary,
    Primary,
    Standing,
    load_standing,
    save_standing,
)

LEASE = 4.0
TICK = 1.5
OFFSET = 1000.0
"""Of the standby's clock."""


def added(version: int) -> Any:
    one = SimpleNamespace(receipt=SimpleNamespace(version=version))
    one.copy = lambda: one
    return one


T = TypeVar("T")


def copy_of(thing: T) -> T:
    """As copy.copy, which took most of the time."""
    made = object.__new__(type(thing))
    vars(made).update(vars(thing))
    return made


def primary(standing: Standing, run: str) -> Primary:
    return Primary(standing, run, LEASE)


@dataclass
class World:
    """A primary, a standby, what is between them, and what workers have heard."""

    primary: Primary = field(default_factory=lambda: primary(Standing(name="p"), "run0"))
    standby: Follower = field(default_factory=lambda: Follower("s"))
    now: float = 0.0
    version: int = 0
    acknowledged: int = 0
    took_over: int | None = None
    """The version that the standby had then."""
    since: float | None = None
    """When the standby began to wait for an answer."""
    requests: tuple[Any, ...] = ()
    answer: Any = None
    restarts: int = 0

    def next(self) -> Iterator[tuple[str, World]]:
        for name in ACTIONS:
            world = copy_of(self)
            world.primary, world.standby = copy_of(self.primary), copy_of(self.standby)
            world.primary.waiting = self.primary.waiting.copy()
            if getattr(world, name)():
                yield name, world

    def key(self) -> tuple[Any, ...]:
        p, s = self.primary, self.standby
        at = lambda time: None if time is None else time - self.now  # noqa: E731
        messages = [(m["have"], m["run"], at(m["heard"]), m["fence"]) for m in self.requests]
        told = None
        if self.answer:
            told = {**self.answer[0], "time": at(self.answer[0]["time"])}, self.answer[1]
        return (
            *(p.standing, p.run, p.follows, p.confirmed, at(p.promised_until), p.complete_from),
            *(len(p.waiting), s.fence, s.run, s.have, at(s.heard), at(s.heard_at), s.complete),
            *(self.version, self.acknowledged, self.took_over, at(self.since), *messages),
            *(str(told), self.restarts),
        )

    def check(self) -> None:
        if self.took_over is not None:
            assert self.acknowledged <= self.took_over, "a difference was lost"
            assert not self.primary.answers(self.now), "there are two primaries"

    def tick(self) -> bool:
        self.now += TICK
        return True

    def ask(self) -> bool:
        if self.since is not None or self.took_over is not None or len(self.requests) > 1:
            return False
        self.since = self.now + OFFSET
        self.requests = (*self.requests, self.standby.asks())
        return True

    def reach(self) -> bool:
        """The oldest message reaches the primary, perhaps long after the standby gave it up."""
        if not self.requests:
            return False
        asked, *rest = self.requests
        self.requests = tuple(rest)
        try:
            self.primary.hear(asked, self.version, self.now)
        except NotPrimary:
            return True
        have = asked["have"]
        if not self.primary.follows:
            self.primary.begin()
            have = self.version
        elif self.primary.waiting:
            have = self.primary.waiting[0].receipt.version
        if not rest and self.since is not None:
            self.answer = self.primary.told(self.now), have
        return True

    def hear(self) -> bool:
        if self.answer is None or self.since is None:
            return False
        told, have = self.answer
        self.standby.hear(told, have, self.now + OFFSET)
        self.answer = self.since = None
        return True

    def give_up(self) -> bool:
        """The standby hears nothing, and may take over."""
        if self.since is None:
            return False
        if self.standby.may_take_over(self.since):
            self.took_over = self.standby.have
        self.answer = self.since = None
        return True

    def add(self) -> bool:
        if self.version > self.acknowledged or self.version == 3:
            return False
        if not self.primary.answers(self.now):
            return False
        self.version += 1
        self.primary.add(added(self.version))
        return True

    def acknowledge(self) -> bool:
        if self.version == self.acknowledged or not self.primary.has_kept(self.version):
            return False
        self.acknowledged = self.version
        return True

    def restart_primary(self) -> bool:
        """What it had added is in its journal."""
        if self.restarts % 2:
            return False
        self.restarts += 1
        self.primary = primary(self.primary.standing, f"run{self.restarts}")
        return True

    def restart_standby(self) -> bool:
        if self.restarts >= 2 or self.took_over is not None:
            return False
        self.restarts += 2
        self.standby = Follower("s")
        self.answer = self.since = None
        return True


ACTIONS = [
    *("tick", "ask", "reach", "hear", "give_up", "add", "acknowledge"),
    *("restart_primary", "restart_standby"),
]


def paired(adds: int = 0) -> World:
    """Where a standby has what there is, and may take over."""
    world = World()
    for _ in range(3):
        assert world.ask()
        assert world.reach()
        assert world.hear()
    for _ in range(adds):
        assert world.add()
    assert world.standby.complete
    return world


def explore(worlds: list[World], depth: int) -> tuple[int, set[str]]:
    """Check all that may happen; how many worlds there were, and what was seen."""
    seen, found = {world.key() for world in worlds}, set()
    for _ in range(depth):
        after = []
        for world in worlds:
            for name, then in world.next():
                then.check()
                if then.key() not in seen:
                    seen.add(then.key())
                    after.append(then)
                found.add(name)
                if then.took_over is not None:
                    found.add(f"took over with {then.took_over}")
        worlds = after
    return len(seen), found


@pytest.mark.parametrize(("begins", "depth"), [("new", 12), ("paired", 12), ("sending", 12)])
def test_there_are_never_two_primaries_and_nothing_acknowledged_is_lost(
    begins: str, depth: int
) -> None:
    worlds = {"new": World(), "paired": paired(), "sending": paired(adds=1)}
    count, found = explore([worlds[begins]], depth)
    assert count > 10_000
    assert found >= {*ACTIONS}
    if begins != "new":
        assert "took over with 0" in found


def test_the_check_finds_a_primary_without_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Primary, "answers", lambda self, now: self.standing.serves)
    with pytest.raises(AssertionError, match="two primaries"):
        explore([paired()], 7)


def test_the_check_finds_a_primary_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Primary, "has_kept", lambda self, version: True)
    with pytest.raises(AssertionError, match="was lost"):
        explore([paired()], 8)


def test_the_check_finds_a_standby_that_is_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "may_take_over", lambda self, since: self.complete)
    with pytest.raises(AssertionError, match="two primaries"):
        explore([paired()], 7)


def test_a_primary_that_is_alone_answers_for_ever() -> None:
    alone = primary(Standing(), "run")
    assert alone.answers(1e9)
    assert alone.has_kept(10**9)
    alone.add(added(1))
    assert not alone.waiting


def test_a_standby_that_ends_lets_its_primary_go_on_alone() -> None:
    world = paired()
    world.now += 10 * LEASE
    assert not world.primary.answers(world.now)
    world.primary.dismiss("another")
    assert not world.primary.answers(world.now)
    world.primary.dismiss("s")
    assert world.primary.answers(world.now)
    assert world.primary.has_kept(1)


def test_a_second_standby_is_refused() -> None:
    world = paired()
    with pytest.raises(NotPrimary, match="another standby"):
        world.primary.hear(Follower("t").asks(), 0, 0.0)


def test_what_a_standby_that_is_not_there_yet_would_need_is_bounded() -> None:
    lone = primary(Standing(), "run")
    lone.begin()
    for version in range(1, 1000):
        lone.add(added(version))
    assert not lone.waiting
    assert not lone.follows


def test_a_clock_that_a_standby_invents_gives_no_longer_lease() -> None:
    world = paired()
    world.primary.hear({**world.standby.asks(), "heard": 1e300}, 0, world.now)
    assert world.primary.promised_until <= world.now + LEASE


def test_a_standing_is_kept_in_a_file(tmp_path: Path) -> None:
    assert load_standing(tmp_path).serves
    standing = Standing(fence=3, serves=False, standby="x", name="y")
    save_standing(tmp_path, standing)
    assert load_standing(tmp_path) == standing
    (tmp_path / "standing.json").write_text("{")
    with pytest.raises(SnapshotError, match="is damaged"):
        load_standing(tmp_path)


def test_a_standby_that_was_never_complete_does_not_take_over() -> None:
    assert not Follower("s").may_take_over(math.inf)
