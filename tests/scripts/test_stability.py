"""Where EASGD is stable: the formulas, the package's rule, and the picture of both."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import stability

from lightning_easgd.algorithms.elastic import stability_bound

_EDGE = 1e-3
"""That near the border rounding decides."""


@pytest.mark.parametrize("workers", [1, 3, 4, 16])
def test_the_rule_is_stable_where_the_formula_says(workers: int) -> None:
    for step in stability.grid(12, 2.2):
        for alpha in stability.grid(12, 2.6 / workers):
            near = {stability.is_stable(workers, step, a) for a in (alpha - _EDGE, alpha + _EDGE)}
            if len(near) == 1:
                grows = stability.radius(stability.together(workers, step, alpha)) > 1
                assert near == {not grows}, (step, alpha)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_in_turn_are_stable_where_the_formula_says(workers: int) -> None:
    for step in stability.grid(9, 2.2):
        for alpha in stability.grid(9, 1.2):
            near = {stability.stable_in_turn(step, a) for a in (alpha - _EDGE, alpha + _EDGE)}
            if len(near) == 1:
                grows = stability.radius(stability.in_turn(workers, step, alpha)) > 1
                assert near == {not grows}, (step, alpha)


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_for_a_small_step_the_border_is_the_bound_of_the_strategy(workers: int) -> None:
    bound = stability_bound(workers)
    assert stability.is_stable(workers, 1e-9, 0.999 * bound)
    assert not stability.is_stable(workers, 1e-9, 1.001 * bound)


@pytest.mark.parametrize(
    ("workers", "admm", "easgd"), [(3, 1.000974, 0.99927), (8, 1.002258, 0.99912)]
)
def test_admm_in_turn_is_unstable_where_easgd_is_not(
    workers: int, admm: float, easgd: float
) -> None:
    """The paper's figure 1: η = .001, ρ = 2.5, F(x) = x²/2."""
    alpha = 2.5 * stability.ETA
    assert stability.radius(stability.admm(workers, stability.ETA, alpha)) == pytest.approx(
        admm, abs=1e-6
    )
    ours = stability.in_turn(workers, stability.ETA, alpha)
    assert stability.radius(ours) == pytest.approx(easgd, abs=1e-5)
    formula = stability.in_turn_by_formula(workers, stability.ETA, alpha)
    np.testing.assert_allclose(ours, formula, rtol=0, atol=1e-14)


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "new" / "stability.png"
    monkeypatch.setattr(sys, "argv", ["stability.py", "--picture", str(picture)])
    stability.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000
