"""Adaptive schedules: where they go, where they stop, and what they are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easgd import AdaptivePeriod, ConsensusTarget
from lightning_easgd.communication import Header, Phase, Stop
from lightning_easgd.exchange.consensus import Consensus
from lightning_easgd.schedules import Durations, Observation, Schedules

HEADER = Header(0, 0, 0, Phase.TRAINING, Stop.NO, False, 0, 0)


def told(consensus: Consensus, distance: float, size: float, *, lr: float) -> Header:
    return replace(HEADER, named=consensus.announce(Durations(1, 2, 3), distance, size, lr=lr))


@given(st.floats(0.0, 1e6), st.floats(0.011, 0.99))
def test_the_strength_goes_by_the_ratio_within_a_factor_and_bounds(distance: float, start: float):
    schedule = ConsensusTarget(0.5, start, least=0.01, most=1.0, factor=1.2)
    schedule.observe(Observation(distance=distance))
    change = min(max((distance / 0.5) ** 0.25, 1 / 1.2), 1.2)
    assert schedule.at(0) == pytest.approx(min(max(start * change, 0.01), 1.0))
    schedule.observe(Observation(distance=None))
    assert schedule.at(0) == pytest.approx(min(max(start * change, 0.01), 1.0))


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_the_distance_is_brought_to_the_target(target: float):
    """Where the distance falls with the strength, and is known an exchange later."""
    schedule = ConsensusTarget(target)
    distance = 0.1
    for _ in range(200):
        seen = distance
        distance = 0.03 / schedule.at(0)
        schedule.observe(Observation(distance=seen))
    assert distance == pytest.approx(target, rel=0.02)


def test_what_is_stable_is_never_left():
    schedule = ConsensusTarget(1e-9)
    schedule.limit(1.6)
    for _ in range(100):
        schedule.observe(Observation(distance=1.0))
        assert schedule.at(0) <= 1.2001
    assert schedule.at(0) == pytest.approx(1.2)
    fewer = ConsensusTarget(1e-9)
    fewer.limit(1.0)
    fewer.load_state(schedule.state())
    assert fewer.at(0) == 0.75
    for most, expected in [(1.1, 1.1), (1.8, 1.6)]:
        chosen = ConsensusTarget(1e-9, most=most)
        chosen.limit(1.6)
        chosen.load_state({"value": 9.0})
        assert chosen.at(0) == expected


def tau_after(variances: list[float | None], lr: float = 0.1, **options: Any) -> list[int]:
    schedule = AdaptivePeriod(4, sample=2, **options)
    taus = []
    for variance in variances:
        schedule.observe(Observation(variance=variance, lr=lr))
        taus.append(int(schedule.at(0)))
    return taus


def test_the_period_falls_while_workers_disagree_and_grows_while_they_do_not():
    first = [1.0, 3.0]  # 2 on average
    assert tau_after([*first, 2.5, 1.5, None]) == [4, 4, 4, 4, 4]
    assert tau_after([*first, 2.7, 2.7, 2.0, 1.3]) == [4, 4, 3, 2, 2, 3]
    assert tau_after([*first, *10 * [9.0]], tau_min=2)[-1] == 2
    assert tau_after([*first, *10 * [0.0]], tau_max=6)[-1] == 6
    assert tau_after([*first, 0.0], lr=0.0) == [4, 4, 4]


def test_variance_is_judged_by_the_learning_rate():
    schedule = AdaptivePeriod(4, sample=1)
    schedule.observe(Observation(variance=2.0, lr=0.1))
    schedule.observe(Observation(variance=0.2, lr=0.01))
    assert schedule.at(0) == 4
    schedule.observe(Observation(variance=2.0, lr=0.01))
    assert schedule.at(0) == 3


@pytest.mark.parametrize("make", [lambda: ConsensusTarget(0.1), lambda: AdaptivePeriod(sample=3)])
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20), st.data())
def test_what_was_learned_survives_a_checkpoint(make: Any, seen: list[float], data: Any):
    cut = data.draw(st.integers(0, len(seen)))
    straight, resumed = make(), make()
    for position, value in enumerate(seen):
        if position == cut:
            named = Schedules({"one": resumed})
            resumed = make()
            Schedules({"one": resumed}).load_state(named.state())
        told = Observation(distance=value, variance=value, lr=0.1)
        straight.observe(told)
        resumed.observe(told)
    assert (straight.at(0), straight.state()) == (resumed.at(0), resumed.state())


def test_the_state_of_another_schedule_is_not_taken():
    saved = Schedules({"beta": ConsensusTarget(0.1, 0.5)}).state()
    schedule = AdaptivePeriod(4)
    Schedules({"tau": schedule, "beta": schedule}).load_state(saved)
    assert schedule.at(0) == 4


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_variance_and_distance_are_those_of_all_workers_and_fragments(p: int, k: int, seed: int):
    rng = np.random.default_rng(seed)
    consensus, center = Consensus(k), rng.normal(size=(k, 3))
    variance = None
    for _ in range(3):
        workers = rng.normal(size=(p, k, 3))
        mean = workers.mean(axis=0)
        for turn in range(k):
            headers = [
                told(
                    consensus,
                    float(np.linalg.norm(x[turn] - center[turn])),
                    float(np.linalg.norm(center[turn])),
                    lr=0.5,
                )
                for x in workers
            ]
            sick = replace(told(consensus, float("nan"), 1.0, lr=0.5), non_finite=True)
            far = float(np.linalg.norm(mean[turn] - center[turn]))
            seen = consensus.note(turn, [*headers, sick], far)
            assert len(seen.durations) == p + 1
            assert len(seen.said) == p
            if turn < k - 1:
                assert (seen.distance, seen.variance) == (None, None)
        square = ((workers - center) ** 2).sum() / p
        assert seen.distance == pytest.approx(np.sqrt(square) / np.linalg.norm(center))
        expected = None if variance is None else pytest.approx(variance, abs=1e-9)
        assert seen.variance == expected
        assert seen.lr == (0.5 if variance is not None else 0.0)
        variance = ((workers - mean) ** 2).sum() / p
    assert consensus.variance == pytest.approx(variance, abs=1e-9)


def test_a_round_that_is_not_whole_tells_nothing():
    consensus = Consensus(2)
    far = told(consensus, 1.0, 1.0, lr=0.1)
    far = replace(far, named={**far.named, "variance": 3.0})
    assert consensus.note(1, [far], 0.0).distance is None
    assert consensus.note(0, [far], None).distance is None
    seen = consensus.note(1, [far], 0.0)
    assert (seen.distance, seen.variance, seen.lr) == (1.0, 3.0, 0.1)
    assert consensus.variance < 0  # a mean was not known
