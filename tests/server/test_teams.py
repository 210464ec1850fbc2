"""Workers that were started together learn from their server when all have ended."""

from __future__ import annotations

from typing import Any

from lightning_easgd.server.teams import Teams
from lightning_easgd.server.values import News

SILENT: dict[str, Any] = {"progress": 0, "finished": False, "stops": False, "saves": {}}


def hear(teams: Teams, worker: str, there: str, now: float = 0.0, **said: Any) -> tuple[int, bool]:
    news = hear_all(teams, worker, there, now, **said)
    return news.training, news.stop


def hear_all(teams: Teams, worker: str, there: str, now: float = 0.0, **said: Any) -> News:
    names = [f"run/{number}" for number in there]
    said = SILENT | said
    return teams.hear(f"run/{worker}", size=3, there=names, now=now, **said)


def test_a_team_is_awaited_until_all_have_finished() -> None:
    teams = Teams()
    assert hear(teams, "0", "0", finished=True) == (2, False)
    assert hear(teams, "1", "01") == (2, False)
    assert hear(teams, "2", "012", finished=True) == (1, False)
    assert hear(teams, "1", "012", finished=True) == (0, False)
    assert hear(teams, "0", "0", finished=True) == (0, False)  # the others have left


def test_one_that_has_finished_hears_how_far_those_are_that_still_train() -> None:
    teams = Teams()
    assert hear_all(teams, "1", "01", progress=5) == News(3, {}, False)
    assert hear_all(teams, "0", "01", progress=7, finished=True) == News(2, {"run/1": 5}, False)
    hear(teams, "1", "01", progress=6)
    assert hear_all(teams, "0", "01", finished=True).progress == {"run/1": 6}
    assert hear_all(teams, "0", "0", finished=True).progress == {}


def test_a_worker_that_is_gone_is_not_awaited() -> None:
    teams = Teams()
    for worker in "012":
        hear(teams, worker, "012")
    assert hear(teams, "0", "01", finished=True) == (1, False)
    assert hear(teams, "1", "01", finished=True) == (0, False)


def test_a_worker_that_never_came_is_awaited_for_a_while() -> None:
    teams = Teams()
    hear(teams, "0", "0")
    assert hear(teams, "0", "0", now=100.0, finished=True) == (2, False)
    assert hear(teams, "0", "0", now=130.0, finished=True) == (0, False)


def test_all_of_a_team_stop_and_nobody_else() -> None:
    teams = Teams()
    assert hear(teams, "0", "01", stops=True) == (3, True)
    assert hear(teams, "1", "01") == (3, True)
    said = {"size": 1, **SILENT}
    assert not teams.hear("other/0", now=0.0, there=["run/0", "other/0"], **said).stop


def test_a_team_that_has_left_is_forgotten() -> None:
    teams = Teams()
    hear(teams, "0", "0", stops=True)
    said = {"size": 1, **SILENT}
    teams.hear("later/0", there=["later/0"], now=0.0, **said)
    assert hear(teams, "0", "0") == (3, False)


def test_what_worker_0_saved_is_told_to_its_team_and_to_no_other() -> None:
    teams, there = Teams(), ["run/0", "run/1", "other/0"]
    saved = {"last.ckpt": "0123456789ab"}

    def saves(worker: str, **said: Any) -> Any:
        return teams.hear(worker, size=2, there=there, now=0.0, **SILENT | said).saves

    assert saves("run/0", saves=saved) == saved
    assert saves("run/1", saves={"mine.ckpt": "ba9876543210"}) == saved
    assert saves("other/0") == {}
    assert saves("run/0") == saves("run/1") == {}
