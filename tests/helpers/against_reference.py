"""Real workers beside the NumPy reference: the same optimizers, and what must be equal."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import reference
import torch
from staying import run_in_turn
from toy import Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy

LR = 0.1
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=LR),
    "nesterov": partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=LR),
}
MAKERS = OPTIMIZERS | {"nesterov, torch's": OPTIMIZERS["nesterov"]}
STEPS = 24
ROWS = {
    2: [{"w": [0, 1], "b": []}, {"w": [2], "b": [0, 1]}],
    4: [{"w": [0], "b": []}, {"w": [1], "b": []}, {"w": [2], "b": []}, {"w": [], "b": [0, 1]}],
}
"""Rows of each parameter of the toy that are in each fragment."""


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
    fitting.fit(module, loader(rank, setup.get("batches", STEPS)))
    return weights(module), seen


def compare(name: str, workers: int, *taus: int, **case: Any) -> None:
    """Compare a training with each τ, all in the same workers, with the reference."""
    setup = case.get("setup", {})
    options = [{"tau": tau} | case.get("options", {}) for tau in taus]
    cases = [(workers, MAKERS[name], each, setup) for each in options]
    for tau, results in zip(taus, run_in_turn(fit, cases, workers=workers), strict=True):
        _require_reference(results, name, workers, tau, **case)


def _require_reference(
    results: list[Any], name: str, workers: int, tau: int, lr: Any = None, **case: Any
) -> None:
    options, setup = case.get("options", {}), case.get("setup", {})
    alpha = case.get("alpha", lambda name, t: 0.9 / workers)
    center, iterates = reference.easgd(
        initial_weights(),
        [batches(rank, setup.get("batches", STEPS)) for rank in range(workers)],
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


def strength(workers: int, fragments: int, pause: int) -> Any:
    """α of each row: β / p if its fragment is exchanged at this step, else 0."""

    def alpha(name: str, t: int) -> Any:
        shape = {"w": (3, 1), "b": (2,)}[name]
        rates = np.zeros(shape)
        if t == STEPS:
            rates[:] = 0.9 / workers
        elif t:
            rates[ROWS[fragments][(t // pause - 1) % fragments][name]] = 0.9 / workers
        return rates

    return alpha
