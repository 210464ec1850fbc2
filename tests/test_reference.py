"""The strategy, through a real Trainer and real processes, against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
from against_reference import LR, OPTIMIZERS, compare, fit
from staying import run_workers


@pytest.mark.parametrize(
    ("name", "workers", "taus"),
    [
        *((name, 2, [1, 2, 5]) for name in OPTIMIZERS),
        *((name, 4, [tau]) for name, tau in zip(OPTIMIZERS, [1, 2, 5], strict=True)),
    ],
)
def test_center_and_workers_follow_the_paper(name: str, workers: int, taus: list[int]) -> None:
    compare(name, workers, *taus, options={"final_exchange": False})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_final_exchange_adds_one_exchange(name: str) -> None:
    compare(name, 2, 5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clock_counts_optimizer_steps_under_gradient_accumulation(name: str) -> None:
    compare(name, 2, 2, setup={"accumulate": 3}, options={"final_exchange": False})


def test_rho_uses_the_learning_rate_of_each_parameter_group() -> None:
    rates = {"w": 0.1, "b": 0.02}
    compare(
        "nesterov",
        2,
        2,
        lr=lambda name, t: rates[name],
        setup={"groups": [{"lr": rates["w"]}, {"lr": rates["b"]}]},
        options={"rho": 3.0, "final_exchange": False},
        alpha=lambda name, t: 3.0 * rates[name],
    )


def decay(step: int) -> float:
    return 0.9**step


@pytest.mark.parametrize("name", ["sgd", "nesterov, torch's", "adamw"])
def test_rho_follows_a_learning_rate_schedule(name: str) -> None:
    compare(
        name,
        2,
        2,
        lr=lambda name, t: LR * decay(t),
        setup={"lr_lambda": decay},
        options={"rho": 3.0, "final_exchange": False},
        alpha=lambda name, t: 3.0 * LR * decay(t),
    )


def test_strength_given_as_a_callable_of_the_step() -> None:
    compare(
        "sgd",
        2,
        2,
        options={"alpha": lambda step: 0.4 / (1 + step), "final_exchange": False},
        alpha=lambda name, t: 0.4 / (1 + t),
    )


def test_without_the_look_ahead_correction_the_center_is_elsewhere() -> None:
    """The correction matters: the parameter's own point gives a center some percent away."""
    make = OPTIMIZERS["nesterov"]
    centers = [
        run_workers(fit, 2, make, {"tau": 2, "elastic_point": point}, {}, workers=2)[0][0]["w"]
        for point in ("iterate", "parameter")
    ]
    assert np.abs(centers[0] - centers[1]).max() > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_is_the_optimizer_on_a_spring(name: str) -> None:
    compare(name, 1, 2, options={"final_exchange": False})


def test_alpha_zero_is_independent_optimizers_and_a_frozen_center() -> None:
    compare("sgd", 2, 2, options={"alpha": 0.0}, alpha=lambda name, t: 0.0)
