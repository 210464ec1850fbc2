"""EASGD by the package's rules alone, in one process: on anything, and on the noisy quadratic."""

from __future__ import annotations

import torch

from lightning_easgd.algorithms import elastic


def simulate(
    workers: torch.Tensor, center: torch.Tensor, *, tau: int, alpha: float, local_step, steps: int
):
    """Paper order with the package's rules; workers (p, n) and center (n,) after each step."""
    for t in range(steps):
        pull = torch.zeros_like(workers)
        if t % tau == 0:
            elastic.difference(list(workers), [center] * len(pull), out=list(pull))
            elastic.scale_(list(pull), [alpha] * len(pull))
        workers -= local_step(workers)
        workers -= pull
        elastic.move_center_([center], [pull.sum(dim=0)])
        yield workers, center


# The noisy quadratic x <- x - η(h x - σξ), p = 4, optimum 0: one column per sample.
P, ETA, H, ALPHA, SIGMA = 4, 0.3, 1.5, 0.225, 2.0
BETA = P * ALPHA


def noisy_quadratic(tau: int, steps: int, samples: int):
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([1.0, 2.0, -3.0, 5.0], dtype=torch.float64)
    x = start[:, None].repeat(1, samples)
    c = torch.full((samples,), 4.0, dtype=torch.float64)

    def local_step(x):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return ETA * (H * x - SIGMA * noise)

    return simulate(x, c, tau=tau, alpha=ALPHA, local_step=local_step, steps=steps)
