"""What rules whose workers restart at the center promise besides their mathematics."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_workers
from toy import Toy, loader, trainer, weights

from lightning_easgd import EASGDStrategy, LocalSGD, TopK


def averaged(rank: int, strategy: Any, make: Any) -> dict[str, np.ndarray]:
    module = Toy(make)
    trainer(2, strategy).fit(module, loader(rank, 50))
    return weights(module)


def test_local_sgd_at_every_step_is_gradient_averaging() -> None:
    """Over 50 steps of SGD, against DistributedDataParallel."""
    make = partial(torch.optim.SGD, lr=0.1)
    rule = EASGDStrategy(algorithm="local_sgd", tau=1)
    ours, theirs = (run_workers(averaged, s, make, workers=2) for s in (rule, "ddp"))
    for got, expected in zip(ours, theirs, strict=True):
        for key, value in got.items():
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-6)


class Slope(Toy):
    """Every step moves a worker by its own constant, wherever it is."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(partial(torch.optim.SGD, lr=1.0), dtype=dtype)
        self.more = torch.nn.Parameter(torch.zeros(700, dtype=dtype))
        self.step = torch.randn(700, dtype=dtype, generator=torch.Generator().manual_seed(rank))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -(self.step @ self.more)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([self.more])


CODECS = ["bf16", "fp16", "int8", TopK(0.3)]
ENDS = [(14, True, 14), (15, True, 15), (15, False, 14)]
"""Steps, whether there is a last exchange, and steps that the center knows of in the end; τ = 2."""


def moved(rank: int) -> Any:
    found = {}
    for codec in CODECS:
        for end in ENDS:
            for fragments in (1, 2):
                module = Slope(rank)
                strategy = EASGDStrategy(
                    algorithm="local_sgd",
                    tau=2,
                    compression=codec,
                    fragments=fragments,
                    bucket_bytes=2000,
                    final_exchange=end[1],
                )
                trainer(3, strategy).fit(module, loader(rank, end[0]))
                found[str(codec), end, fragments] = module.more.detach().numpy().copy()
    return module.step.numpy(), found


def test_nothing_is_lost_on_the_way_to_the_center() -> None:
    """Whatever a codec rounds arrives in the end, though the workers restart."""
    results = run_workers(moved, workers=3)
    mean = sum(step for step, _ in results) / 3
    for _, found in results:
        for (codec, end, fragments), center in found.items():
            if end[1] or fragments == 1:  # else each row knows of another number of steps
                np.testing.assert_allclose(center, end[2] * mean, atol=1e-9, err_msg=codec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, r"overlap=True is not possible with LocalSGD\(\).*Remove overlap"),
        ({"tau": "auto"}, r"tau='auto' has no meaning under LocalSGD\(\).*Give tau a number"),
        ({"beta": 0.9}, r"beta=0.9 has no meaning .* how strongly workers and center pull"),
        ({"alpha": 0.0}, r"alpha=0.0 has no meaning"),
        ({"rho": lambda step: 1.0}, r"rho=.* has no meaning"),
        ({"elastic_point": "iterate"}, r"elastic_point='iterate' .* from where a worker is pulled"),
    ],
    ids=str,
)
def test_what_has_no_meaning_under_a_rule_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**{"algorithm": "local_sgd", **options})


@pytest.mark.parametrize("algorithm", ["localsgd", None, LocalSGD])
def test_an_unknown_rule_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"algorithm=.*Allowed: 'easgd', 'local_sgd'.*Rule"):
        EASGDStrategy(algorithm=algorithm)


def unlike(rank: int) -> None:
    trainer(2, EASGDStrategy(algorithm=["easgd", "local_sgd"][rank])).fit(
        Toy(partial(torch.optim.SGD, lr=0.1)), loader(rank, 2)
    )


def test_workers_with_different_rules_are_told() -> None:
    outcomes = run_workers(unlike, workers=2, check=False)
    assert all("algorithm=LocalSGD()" in outcome.message for outcome in outcomes)
