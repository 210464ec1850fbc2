"""Lightning's own collectives give under EASGD what they give under DDP."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from staying import run_workers
from torch import Tensor
from torch.distributed import ReduceOp, distributed_c10d
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1)
OPERATIONS = ["mean", "avg", "AVG", "sum", "max", "min", "product", ReduceOp.SUM, ReduceOp.MAX]


def everything(rank: int, strategy: Any) -> list[Any]:
    """What collectives of all kinds return in the middle of a fit."""
    module, seen = Toy(SGD), []
    fitting = trainer(2, strategy)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx != 3:
            return
        for op in OPERATIONS:
            for value in (torch.tensor([1.5, -2.25]) * (rank + 1), torch.tensor(3 + 2 * rank)):
                reduced = fitting.strategy.reduce(value, reduce_op=op)
                assert reduced is value
                seen.append((str(op), reduced.dtype, reduced.tolist()))
        seen.append(fitting.strategy.reduce("no tensor"))
        seen.extend(
            fitting.strategy.broadcast({"from": rank, "more": "é" * 100}, src) for src in (0, 1)
        )
        seen.extend(
            fitting.strategy.reduce_boolean_decision(rank == 0, all=a) for a in (True, False)
        )
        x = torch.tensor([rank + 1.0], requires_grad=True)
        gathered: Tensor = module.all_gather(x, sync_grads=True)
        gathered.prod().backward()
        seen.append((gathered.tolist(), x.grad.tolist()))
        fitting.strategy.barrier("a name")

    module.on_train_batch_start = on_train_batch_start
    fitting.fit(module, loader(rank, 6))
    return seen


def test_lightnings_collectives_are_those_of_ddp() -> None:
    expected = run_workers(everything, "ddp", workers=2)
    assert run_workers(everything, EASGDStrategy(tau=2), workers=2) == expected
    assert len(expected[0]) == 2 * len(OPERATIONS) + 6


def default_timeout() -> timedelta:
    backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    return backend.options._timeout


def timeouts(rank: int, options: dict[str, Any], fails: bool) -> list[timedelta]:
    module, seen = Toy(SGD), []

    def on_train_start() -> None:
        seen.append(default_timeout())
        if fails:
            raise ZeroDivisionError

    module.on_train_start = on_train_start
    fitting = trainer(1, EASGDStrategy(timeout=timedelta(minutes=7), **options))
    try:
        fitting.fit(module, loader(rank, 2))
    except ZeroDivisionError:
        assert fails
    return [*seen, default_timeout()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("exchange_timeout", "expected"), [(20, 25), (500, 420)])
def test_the_default_group_waits_no_longer_while_training_is_set_up(
    exchange_timeout: float, expected: float, fails: bool
) -> None:
    options = {"exchange_timeout": exchange_timeout}
    (seen,) = run_workers(timeouts, options, fails, workers=1)
    assert seen == [timedelta(seconds=expected), timedelta(minutes=7)]
