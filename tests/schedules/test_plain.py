"""Schedules of the step alone: closed forms, where they begin and end, and what is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_easgd import (
    AdaptivePeriod,
    Anneal,
    ConsensusTarget,
    Cosine,
    DiLoCo,
    EASGDStrategy,
    Exponential,
    Linear,
    SlowMo,
    Steps,
)
from lightning_easgd.schedules import Period, Strength, TrainingLength

FORMS = {
    Linear: lambda a, b, u: (1 - u) * a + u * b,
    Cosine: lambda a, b, u: (a + b) / 2 + (a - b) / 2 * np.cos(np.pi * u),
    Exponential: lambda a, b, u: np.exp((1 - u) * np.log(a) + u * np.log(b)),
}
VALUES = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("make", FORMS)
@settings(deadline=None)  # seconds depend on what else runs
@given(start=VALUES, stop=VALUES, steps=st.integers(1, 10_000), data=st.data())
def test_ramps_have_their_closed_forms(make: Any, start: float, stop: float, steps: int, data: Any):
    ramp = make(start, stop, steps=steps)
    assert (ramp.at(0), ramp.at(steps), ramp.at(10 * steps)) == (
        pytest.approx(start),
        *(stop, stop),
    )
    step = data.draw(st.integers(0, steps))
    assert ramp.at(step) == pytest.approx(FORMS[make](start, stop, step / steps), rel=1e-9)
    assert ramp.bounds[0] <= ramp.at(step) <= ramp.bounds[1]


@pytest.mark.parametrize("make", FORMS)
@settings(deadline=None)  # seconds depend on what else runs
@given(fraction=st.floats(0.01, 1.0), steps=st.integers(1, 10_000), step=st.integers(0, 10_000))
def test_a_fraction_is_of_the_steps_of_training(make: Any, fraction: float, steps: int, step: int):
    ramp = make(2.0, 5.0, fraction=fraction)
    assert ramp.at(step) == pytest.approx(2.0)  # how long it takes is not known yet
    ramp.begin(TrainingLength(steps))
    u = min(1.0, step / (fraction * steps))
    assert ramp.at(step) == pytest.approx(FORMS[make](2.0, 5.0, u), rel=1e-9)
    ramp.begin(TrainingLength(2 * steps))  # resumed for longer
    u = min(1.0, step / (fraction * 2 * steps))
    assert ramp.at(step) == pytest.approx(FORMS[make](2.0, 5.0, u), rel=1e-9)


@settings(deadline=None)  # seconds depend on what else runs
@given(
    edges=st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True).map(sorted),
    step=st.integers(0, 120),
)
def test_steps_hold_each_value_from_its_edge_on(edges: list[int], step: int):
    values = [10.0 + i for i in range(len(edges) + 1)]
    expected = values[sum(edge <= step for edge in edges)]
    assert Steps(values, steps=edges).at(step) == expected
    parts = Steps(values, fractions=[edge / 128 for edge in edges])
    assert parts.at(step) == values[0]
    parts.begin(TrainingLength(128))
    assert parts.at(step) == expected


def test_annealing_is_parles_product():
    anneal = Anneal(0.5, 10.0)
    assert anneal.at(1000) == 0.5
    anneal.begin(TrainingLength(None, epoch_steps=7))
    rho = 0.5
    for step in range(2000):
        if step and step % 25 == 0:
            rho *= 1 + 0.5 / 7
        assert anneal.at(step) == pytest.approx(min(rho, 10.0))
    assert anneal.at(10**9) == 10.0
    assert Anneal(1.0, 2.0, batches=1, every=1).at(1) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Linear(1, 2), r"Linear\(start=1, stop=2, fraction=1.0\) takes a fraction .*give .* steps"),
        (Steps([1, 2], fractions=[0.5]), "no known end.*Set Trainer"),
        (Anneal(1.0), "steps in an epoch, and that is not known here.*Give batches"),
    ],
)
def test_a_training_without_an_end_is_refused(schedule: Any, message: str):
    with pytest.raises(ValueError, match=message):
        schedule.begin(TrainingLength.of_all([TrainingLength(5, 5), TrainingLength(None, None)]))
    schedule.begin(TrainingLength.of_all([TrainingLength(5, 5), TrainingLength(4, 4)]))


def test_the_worker_with_most_steps_says_when_training_ends():
    assert TrainingLength.of_all([TrainingLength(5, None), TrainingLength(9, 3)]) == TrainingLength(
        9, None
    )


@pytest.mark.parametrize("fragments", [1, 3])
def test_periods_are_rounded_to_whole_exchanges(fragments: int):
    period = Period(Linear(1, 16, steps=100), fragments)
    for step in range(120):
        value = 1 + 15 * min(1.0, step / 100)
        tau, due = period.after(step)
        assert tau % fragments == 0
        assert due == step + tau // fragments > step
        assert tau == fragments or abs(tau - value) <= fragments / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear("1", 2), "start='1' is not allowed. Allowed: finite numbers"),
        (lambda: Cosine(1, math.inf), "stop=inf is not allowed"),
        (lambda: Linear(1, 2, steps=5, fraction=0.5), "which both say how long"),
        (lambda: Linear(1, 2, steps=0), "steps=0 is not allowed. Allowed: a whole number"),
        (lambda: Linear(1, 2, fraction=1.5), r"fraction=1.5 is not allowed. .* in \(0, 1\]"),
        (lambda: Exponential(0, 1), "start=0 is not allowed. Allowed: a positive number"),
        (lambda: Steps([1, 2]), "Got steps=None and fractions=None. Give one"),
        (lambda: Steps([1, 2], steps=[3, 4]), r"Got 2 values and \(3, 4\)"),
        (lambda: Steps([1, 2, 3], steps=[4, 4]), "in ascending order"),
        (lambda: Steps([1], steps=[]), "at least two values"),
        (lambda: Steps([1, 2], fractions=[1.0]), r"fractions=1.0 .* in \(0, 1\)"),
        (lambda: Anneal(2.0, 1.0), "the strength rises. Allowed: 0 < start <= stop"),
        (lambda: Anneal(1.0, every=0), "every=0 is not allowed"),
        (lambda: ConsensusTarget(0), "target=0 is not allowed. Allowed: a number above 0"),
        (lambda: ConsensusTarget(0.1, factor=1), "factor=1 is not allowed"),
        (lambda: ConsensusTarget(0.1, 0.5, least=0.6), r"least=0.6 .* in \(0, start=0.5\]"),
        (lambda: ConsensusTarget(0.1, 0.5, most=0.4), "most=0.4 .* at least start=0.5"),
        (lambda: AdaptivePeriod(0), "start=0 is not allowed. Allowed: a whole number"),
        (lambda: AdaptivePeriod(4, tau_max=3), "start=4 .* from tau_min=1 to tau_max=3"),
        (lambda: AdaptivePeriod(tolerance=1), r"tolerance=1 .* in \[0, 1\)"),
        (lambda: AdaptivePeriod(sample=1.5), "sample=1.5 is not allowed"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": Linear(0.5, 4)}, "A schedule gives tau=0.5 at one end. Allowed: 1"),
        ({"tau": Linear(1, 4), "fragments": 8}, "never reaches fragments=8"),
        ({"beta": Linear(0.9, 2)}, r"beta=2 is not allowed. Allowed: a number in \(0, 2\)"),
        ({"rho": Cosine(-1, 1)}, "rho=-1 is not allowed"),
        ({"beta": AdaptivePeriod()}, r"beta=AdaptivePeriod\(.*\) is not possible: .* sets tau"),
        ({"tau": ConsensusTarget(0.1)}, "ConsensusTarget sets beta or alpha"),
        ({"rho": ConsensusTarget(0.1)}, "ConsensusTarget sets beta or alpha"),
        ({"tau": Anneal(1.0)}, "Anneal sets rho or alpha or beta"),
        ({"tau": AdaptivePeriod(), "compression": "topk"}, "only a part of it arrives. Take"),
        (
            {"algorithm": "slowmo", "beta": Linear(0.5, 0.9)},
            "beta=Linear.* is not possible with SlowMo",
        ),
    ],
)
def test_what_a_schedule_cannot_set_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlowMo(Linear(1.0, 3.0)), r"outer_lr=3.0 is not stable .* in \(0, 3\) "),
        (lambda: DiLoCo(Cosine(0.7, 0.0)), r"outer_lr=0.0 .* in \(0, 1.357\)"),
        (lambda: DiLoCo(lambda step: 1.4 if step == 0 else 1.0), "outer_lr=1.4 is not stable"),
        (lambda: SlowMo(lambda step: 4.0).at(8), "outer_lr=4.0 is not stable"),
        (lambda: SlowMo(AdaptivePeriod()), "is not possible: AdaptivePeriod sets tau"),
    ],
)
def test_outer_rates_that_leave_the_stable_range_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_reads_the_value_at_the_step_and_is_not_changed():
    rule = SlowMo(Linear(1.0, 0.0 + 0.5, steps=10), 0.4)
    assert rule.at(5).outer_lr == pytest.approx(0.75)
    assert "outer_lr=Linear(start=1.0, stop=0.5, steps=10)" in repr(rule)
    assert SlowMo(lambda step: 1.0 / (1 + step)).at(3).outer_lr == 0.25
    plain = SlowMo(0.5)
    assert plain.at(7) is plain
    assert repr(pickle.loads(pickle.dumps(rule))) == repr(rule)


def test_what_one_run_learns_stays_in_it():
    own = ConsensusTarget(0.1)
    used = Strength("beta", own).schedule
    used.load_state({"value": 0.3})
    assert (own.at(0), used.at(0)) == (0.9, 0.3)
