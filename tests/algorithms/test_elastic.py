"""Vectors, closed forms and properties of synchronous EASGD, on the update rules alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from noisy_quadratic import ALPHA, BETA, ETA, SIGMA, H, P, noisy_quadratic, simulate

from lightning_easgd.algorithms import elastic


@pytest.mark.parametrize(
    ("p", "tau", "alpha", "expected"),
    [
        (1, 2, 1.0, [(1, 0), (2, 0), (1, 2), (2, 2), (3, 2)]),
        (2, 1, 0.5, [(1, 0), (1.5, 1), (2.25, 1.5), (2.875, 2.25)]),
        (4, 2, 0.225, [(1, 0), (2, 0), (2.55, 1.8), (3.55, 1.8), (4.15625, 3.375)]),
    ],
)
def test_vectors_of_unit_steps(p, tau, alpha, expected):
    """Learning rate 1, gradient -1, everything starts at 0."""
    start = torch.zeros(p, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    states = simulate(*start, tau=tau, alpha=alpha, local_step=lambda x: -1.0, steps=len(expected))
    for (x, c), (want_x, want_c) in zip(states, expected, strict=True):
        torch.testing.assert_close(x, torch.full_like(x, want_x))
        torch.testing.assert_close(c, torch.full_like(c, want_c))


def roots() -> tuple[float, float]:
    a, kappa2 = ETA * H + (P + 1) * ALPHA, ETA * H * P * ALPHA
    return tuple(1 - (a + sign * math.sqrt(a * a - 4 * kappa2)) / 2 for sign in (-1, 1))


def expected_center(t: int) -> float:
    gamma, phi = roots()
    u = sum(x - ALPHA / (1 - BETA - phi) * 4 for x in (1, 2, -3, 5))
    return gamma**t * 4 + (gamma**t - phi**t) / (gamma - phi) * ALPHA * u


def variance(t: int) -> float:
    gamma, phi = roots()

    def series(root: float) -> float:
        return (root**2 - root ** (2 * t)) / (1 - root**2)

    mixed = 2 * (gamma * phi - (gamma * phi) ** t) / (1 - gamma * phi)
    scale = (P * ALPHA * ETA / (gamma - phi)) ** 2 * SIGMA**2 / P
    return scale * (series(gamma) + series(phi) - mixed)


def stationary_variance(tau: int) -> float:
    q = 1 - ETA * H
    a, s = q ** (tau - 1), sum(q ** (2 * j) for j in range(tau))
    trace, d = 1 - BETA + a * (q - ALPHA), a * ((1 - BETA) * q - ALPHA)
    return (BETA * ETA * SIGMA) ** 2 / P * s * (1 + d) / ((1 - d) * ((1 + d) ** 2 - trace**2))


def test_closed_forms_have_their_published_values():
    assert expected_center(1) == pytest.approx(1.525)
    assert expected_center(2) == pytest.approx(1.328125)
    assert variance(2) == pytest.approx(0.0729)
    assert variance(5) == pytest.approx(0.0985988, abs=1e-7)
    assert stationary_variance(1) == pytest.approx(0.10174685871897)
    assert [stationary_variance(tau) for tau in (2, 4, 16)] == pytest.approx(
        [0.1057932, 0.1063988, 0.1055728], abs=1e-7
    )


def test_mean_and_variance_of_the_center_follow_the_closed_forms():
    samples = 40_000
    for t, (_, c) in enumerate(noisy_quadratic(tau=1, steps=6, samples=samples), start=1):
        error = math.sqrt(max(variance(t), 1e-30) / samples)
        assert float(c.mean()) == pytest.approx(expected_center(t), abs=5 * error + 1e-12)
        assert float(c.var()) == pytest.approx(variance(t), rel=5 * math.sqrt(2 / samples))


@pytest.mark.parametrize("tau", [1, 2, 4, 16])
def test_stationary_variance_at_exchange_times(tau):
    samples = 40_000
    *_, (_, c) = noisy_quadratic(tau=tau, steps=12 * tau + 1, samples=samples)
    assert float(c.var()) == pytest.approx(stationary_variance(tau), rel=5 * math.sqrt(2 / samples))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
def test_stability_bound_separates_convergence_from_divergence(p):
    """As η -> 0 the disagreement grows for α above 2/(p+1) and shrinks below it."""
    bound = elastic.stability_bound(p)

    def disagreement(alpha: float) -> float:
        generator = torch.Generator().manual_seed(p)
        x = torch.randn(p, 3, dtype=torch.float64, generator=generator)
        c = torch.zeros(3, dtype=torch.float64)
        *_, (x, c) = simulate(x, c, tau=1, alpha=alpha, local_step=lambda x: 1e-9 * x, steps=2000)
        return float((x - c).norm())

    assert disagreement(0.98 * bound) < 1e-3
    assert disagreement(1.02 * bound) > 1e3


@pytest.mark.parametrize("p", [1, 2, 5])
def test_an_exchange_conserves_the_sum_of_workers_and_center(p):
    generator = torch.Generator().manual_seed(p)
    x = torch.randn(p, 1000, dtype=torch.float64, generator=generator)
    c = torch.randn(1000, dtype=torch.float64, generator=generator)
    before = x.sum(dim=0) + c
    states = simulate(x, c, tau=1, alpha=0.3, local_step=lambda x: 0.0, steps=5)
    for workers, center in states:
        torch.testing.assert_close(workers.sum(dim=0) + center, before, rtol=0, atol=1e-12)


def test_alpha_one_over_p_with_equal_workers_moves_the_center_to_their_mean():
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    _, c = next(
        simulate(
            x,
            torch.zeros(1, dtype=torch.float64),
            tau=1,
            alpha=0.5,
            local_step=lambda x: 0,
            steps=1,
        )
    )
    assert float(c) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_difference_is_computed_in_the_precision_of_the_center(dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    worker = torch.tensor([[1.0, 256.0, 0.5], [3.0, -1.0, math.inf]]).t().to(dtype)
    center = torch.tensor([[1.0009765625, 3.0], [1e-9, -1.0], [0.5, 1.0]], dtype=exact)
    out = [torch.full((3, 2), math.nan, dtype=exact), torch.empty(0, dtype=exact)]
    elastic.difference([worker, worker[:0, 0]], [center, center[:0, 0]], out)
    assert out[0].equal(worker.to(exact) - center)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_look_ahead_is_undone_exactly(momentum):
    """The iterate recovered from torch's Nesterov SGD is that of Alg. 2, to rounding."""
    y = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([y], lr=0.05, momentum=momentum, nesterov=True)
    x, v = y.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for _ in range(40):
        gradient = torch.sin(y.detach())
        y.grad = gradient.clone()
        v = momentum * v - 0.05 * gradient
        x = x + v
        optimizer.step()
        iterate = y.detach().clone()
        buffer = optimizer.state[y]["momentum_buffer"]
        elastic.undo_look_ahead_([iterate], [buffer], momentum, 0.05)
        torch.testing.assert_close(iterate, x, rtol=0, atol=1e-12)


def growth(workers: int, alpha: float, weight: float, momentum: float, waits: int) -> float:
    """By how much the difference of alike workers grows between two sendings, at most.

    The state is x - c, what each worker holds back, and the center's velocity.
    """
    held = np.array([alpha, 1 - alpha * weight, 0.0])
    wait = np.array([[1 - alpha, alpha * weight, -momentum], held, [0.0, 0.0, momentum]])
    moved = workers * held + [0.0, 0.0, momentum]
    send = np.array([[1 - alpha, alpha * weight, 0.0] - moved, np.zeros(3), moved])
    return max(abs(np.linalg.eigvals(send @ np.linalg.matrix_power(wait, waits - 1))))


WAITS = [*range(1, 13), 16, 30, 100, 300]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 32])
def test_what_is_held_back_leaves_the_stable_range_as_it_is(workers: int) -> None:
    bound, weight = elastic.stability_bound(workers), elastic.residual_weight(workers)
    for part in (0.1, 0.5, 0.9, 0.999):
        assert max(growth(workers, part * bound, weight, 0.0, n) for n in WAITS) < 1
    assert growth(workers, 1.001 * bound, weight, 0.0, 1) > 1
    if workers > 1:  # a worker that is pulled to c alone, and what was tried at first
        assert growth(workers, 0.5 * bound, 0.0, 0.0, 900) == pytest.approx(workers)
        assert growth(workers, 0.5 * bound, 0.9 * (workers - 1) / 2, 0.0, 900) > 1


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("workers", [1, 2, 4, 32])
def test_what_is_held_back_under_momentum(workers: int, momentum: float) -> None:
    weight = elastic.residual_weight(workers, momentum)
    for part in (0.1, 0.5, 1.0):
        alpha = part / (1 + weight)
        assert max(growth(workers, alpha, weight, momentum, n) for n in WAITS) < 1
    if momentum >= 0.9:
        assert max(growth(workers, 0.9 / workers, weight, momentum, n) for n in range(1, 9)) > 1


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("waits", [1, 2, 5, 20])
def test_the_stable_range_where_the_center_waits(workers: int, waits: int) -> None:
    """Workers lose α (x - c) at once; the center gets it with every so many exchanges."""
    bound = elastic.stability_bound(workers, waits=float(waits))
    assert growth(workers, 0.99 * bound, 0.0, 0.0, waits) < 1
    assert growth(workers, 1.01 * bound, 0.0, 0.0, waits) > 1
