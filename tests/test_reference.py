"""The strategy, through a real Trainer and real processes, against the NumPy reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from processes import run_workers
from toy import Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy

LR = 0.1
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=LR),
    "nesterov": partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=LR),
}
MAKERS = OPTIMIZERS | {"nesterov, torch's": OPTIMIZERS["nesterov"]}


def reference_optimizers(name: str, lr: Any, workers: int) -> list[Any]:
    start = initial_weights()
    make = {
        "sgd": lambda: reference.Sgd(lr),
        "nesterov": lambda: reference.Nesterov(lr, 0.9, start),
        "nesterov, torch's": lambda: reference.TorchNesterov(lr, 0.9, start),
        "adamw": lambda: reference.AdamW(lr, start),
    }[name]
    return [make() for _ in range(workers)]


def fit(rank: int, workers: int, make: Any, options: dict[str, Any], setup: dict[str, Any]) -> Any:
    """Train the toy; the center, and the worker's weights before they are replaced by it."""
    module = Toy(make, groups=setup.get("groups"))
    seen = {}
    if "lr_lambda" in setup:
        configure = module.configure_optimizers

        def with_schedule() -> Any:
            optimizer = configure()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, setup["lr_lambda"])
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        module.configure_optimizers = with_schedule
    module.on_train_epoch_end = lambda: seen.update(weights(module))
    fitting = trainer(
        workers, EASGDStrategy(**options), accumulate_grad_batches=setup.get("accumulate", 1)
    )
    fitting.fit(module, loader(rank, setup.get("batches", 24)))
    return weights(module), seen


def compare(name: str, workers: int, tau: int, lr: Any = None, **case: Any) -> None:
    options, setup = case.get("options", {}), case.get("setup", {})
    alpha = case.get("alpha", lambda name, t: 0.9 / workers)
    results = run_workers(
        fit, workers, MAKERS[name], {"tau": tau} | options, setup, workers=workers
    )
    center, iterates = reference.easgd(
        initial_weights(),
        [batches(rank, setup.get("batches", 24)) for rank in range(workers)],
        optimizers := reference_optimizers(name, lr or (lambda name, t: LR), workers),
        tau=tau,
        alpha=alpha,
        accumulate=setup.get("accumulate", 1),
        final_exchange=options.get("final_exchange", True),
    )
    for rank, (got, _) in enumerate(results):
        for key, value in got.items():
            np.testing.assert_array_equal(value, results[0][0][key], err_msg=f"worker {rank}")
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)
    if not options.get("final_exchange", True):
        for rank, (_, worker) in enumerate(results):
            point = optimizers[rank].gradient_point(iterates[rank])
            for key, value in worker.items():
                np.testing.assert_allclose(value, point[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("tau", [1, 2, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_center_and_workers_follow_the_paper(name: str, tau: int, workers: int) -> None:
    compare(name, workers, tau, options={"final_exchange": False})


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
