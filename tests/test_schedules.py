from __future__ import annotations

import numpy as np
import pytest

from lightning_easgd.schedules import Period, Strength

BAD_TAU = [0, -1, 1.5, float("nan"), float("inf"), "4", None, True]


@pytest.mark.parametrize("tau", BAD_TAU)
def test_bad_tau_is_refused_with_what_was_given_and_what_is_allowed(tau):
    with pytest.raises(ValueError, match=r"tau=.* Allowed: a whole number"):
        Period(tau)


@pytest.mark.parametrize("tau", BAD_TAU)
def test_bad_tau_of_a_callable_is_refused_when_it_is_returned(tau):
    with pytest.raises(ValueError, match="tau="):
        Period(lambda step: tau).after(0)


@pytest.mark.parametrize("tau", [1, 4, 4.0, np.int64(4)])
def test_constant_tau_is_due_at_its_multiples(tau):
    period = Period(tau)
    due, step = [], 0
    while step < 20:
        given, step = period.after(step)
        assert given == tau
        due.append(step)
    assert due == list(range(int(tau), 20 + int(tau), int(tau)))[: len(due)]


def test_constant_tau_keeps_its_phase_when_it_starts_in_the_middle():
    assert Period(4).after(6) == (4, 8)


def test_callable_tau_counts_from_the_last_exchange():
    period = Period(lambda step: 1 if step < 3 else 5)
    assert [period.after(step) for step in (0, 1, 2, 3)] == [(1, 1), (1, 2), (1, 3), (5, 8)]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("beta", v) for v in (0, 2, 2.5, -0.1, float("nan"), float("inf"), "1", True)),
        *((kind, v) for kind in ("alpha", "rho") for v in (-0.1, float("nan"), float("inf"), "1")),
    ],
)
def test_bad_strength_is_refused(kind, value):
    with pytest.raises(ValueError, match=f"{kind}=.* is not allowed. Allowed: "):
        Strength(kind, value)
    with pytest.raises(ValueError, match=f"{kind}="):
        Strength(kind, lambda step: value).at(0)


@pytest.mark.parametrize("given", [{"beta": 0.9, "alpha": 0.1}, {"alpha": 0.1, "rho": lambda t: 1}])
def test_two_strengths_are_refused(given):
    with pytest.raises(ValueError, match=r"Got .*: at most one of beta, alpha and rho"):
        Strength.choose(**({"beta": None, "alpha": None, "rho": None} | given))


def test_the_default_is_the_papers_beta():
    strength = Strength.choose(beta=None, alpha=None, rho=None)
    assert strength.alpha(strength.at(0), lr=0.1, workers=4) == pytest.approx(0.9 / 4)


def test_elastic_symmetry_relates_the_three():
    assert Strength("alpha", 0.2).alpha(0.2, lr=0.1, workers=4) == 0.2
    assert Strength("beta", 0.8).alpha(0.8, lr=0.1, workers=4) == pytest.approx(0.2)
    assert Strength("rho", 2.0).alpha(2.0, lr=0.1, workers=4) == pytest.approx(0.2)
