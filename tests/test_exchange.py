"""Overlap, collectives and headers, with real processes."""

from __future__ import annotations

import multiprocessing
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from inside import recorded_collectives
from lightning.pytorch.loggers.logger import DummyLogger
from modules import WithNorm, final_bits
from staying import run_in_turn, run_workers
from torch.distributed import distributed_c10d
from toy import Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDMonitor, EASGDStrategy
from lightning_easgd.exchange.outside_writes import OutsideWrites

SGD = partial(torch.optim.SGD, lr=0.1)
NESTEROV = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
ADAMW = partial(torch.optim.AdamW, lr=0.1)
OPTIMIZERS = {"sgd": SGD, "nesterov": NESTEROV, "adamw": ADAMW}


@pytest.mark.parametrize(
    ("tau", "name", "final"),
    [
        # All pairs of values.
        (tau, name, (t + n) % 2 == 0)
        for t, tau in enumerate([1, 2, 5])
        for n, name in enumerate(OPTIMIZERS)
    ],
)
def test_overlap_changes_no_bit(tau: int, name: str, final: bool) -> None:
    """[Note: exact overlap] Workers and center, parameters and buffers, whatever the buckets."""
    options = {"tau": tau, "final_exchange": final}
    ways = [{"overlap": False, "bucket_bytes": 2**20}, {"overlap": True, "bucket_bytes": 12}]
    cases = [(OPTIMIZERS[name], options | way) for way in ways]
    blocking, behind = run_in_turn(final_bits, cases, workers=2)
    for mine, theirs in zip(behind, blocking, strict=True):
        for got, expected in zip(mine, theirs, strict=True):
            assert got.keys() == expected.keys()
            for key, value in got.items():
                assert value.tobytes() == expected[key].tobytes(), key


class PerBatch(pl.Callback):
    """Cuts the recorded calls into batches."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.batches = calls, []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.calls.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches.append(list(self.calls))
        self.calls.clear()


def collectives_per_batch(rank: int, strategy: Any) -> list[list[str]]:
    calls: list[str] = []
    counter = PerBatch(calls)
    with recorded_collectives(calls):
        strategy = strategy() if callable(strategy) else strategy
        monitors = [EASGDMonitor()] if isinstance(strategy, EASGDStrategy) else []
        fitting = trainer(
            2,
            strategy,
            callbacks=[counter, *monitors],
            logger=DummyLogger(),
            log_every_n_steps=1,
        )
        fitting.fit(WithNorm(SGD), loader(rank, 9, torch.float32))
    return counter.batches


def test_no_collective_outside_exchanges() -> None:
    make = partial(EASGDStrategy, tau=4, bucket_bytes=40)
    for batches in run_workers(collectives_per_batch, make, workers=2):
        # 21 parameters of 4 bytes in buckets of 40: 3 of them; 6 statistics of 8: 2.
        exchange = ["all_gather"] + 5 * ["all_reduce"]
        assert batches == [exchange if step in (4, 8) else [] for step in range(9)]


def test_the_count_sees_what_lightning_does_under_ddp() -> None:
    for batches in run_workers(collectives_per_batch, "ddp", workers=2):
        assert all("broadcast" in batch for batch in batches)


def ahead(rank: int, reached: Any) -> int:
    """Worker 1 waits in step 3 until worker 0 has finished step 9."""
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            assert reached.wait(timeout=30), "worker 0 did not get ahead"

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank == 0 and batch_idx == 9:
            reached.set()

    module.on_train_batch_start = on_train_batch_start
    module.on_train_batch_end = on_train_batch_end
    trainer(2, EASGDStrategy(tau=5)).fit(module, loader(rank, 14))
    return 1


def test_a_worker_may_run_a_whole_period_ahead_of_the_slowest() -> None:
    """The sum of the exchange at step 5 is first needed at step 10."""
    assert run_workers(ahead, multiprocessing.get_context("fork").Event(), workers=2) == [1, 1]


def ends_by_error(rank: int, in_the_step: bool) -> dict[str, bytes]:
    """The worker's weights after an error that comes in its third step, or right behind it."""
    module, strategy, steps = Toy(SGD), EASGDStrategy(tau=1), 0

    def fail(*_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("on purpose")

    owner, name = (
        (OutsideWrites, "before_exchange") if in_the_step else (module, "on_train_batch_end")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer(1, strategy).fit(module, loader(rank, 5))
    return bits(weights(module))


def test_what_was_sent_is_taken_even_if_a_look_at_the_weights_fails() -> None:
    inside, behind = (run_workers(ends_by_error, way, workers=1) for way in (True, False))
    assert inside == behind


def out_of_step(rank: int) -> None:
    strategy = EASGDStrategy(tau=lambda step: 2 + rank)
    trainer(2, strategy).fit(Toy(SGD), loader(rank, 7))


def test_workers_that_fall_out_of_step_all_get_the_same_readable_error() -> None:
    outcomes = run_workers(out_of_step, workers=2, check=False, timeout=30)
    assert [o.error for o in outcomes] == ["ExchangeError"] * 2
    assert outcomes[0].message == outcomes[1].message
    assert "worker 0 at step 2, worker 1 at step 3" in outcomes[0].message


def drifted(rank: int) -> None:
    module, strategy = Toy(SGD), EASGDStrategy(tau=1)

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 0:
            strategy._fit.center.cohorts[0].fragments[0].center.parts[0][0] += 1e-9

    module.on_train_batch_end = on_train_batch_end
    trainer(2, strategy).fit(module, loader(rank, 20))


def test_centers_that_drift_apart_are_noticed() -> None:
    outcomes = run_workers(drifted, workers=2, check=False)
    assert [o.error for o in outcomes] == ["ExchangeError"] * 2
    assert all("copies of the center have drifted apart" in o.message for o in outcomes)


def ways(rank: int, options: Any) -> tuple[int, bool]:
    """How many process groups there are, and whether exchanges use the default one."""
    module, seen = Toy(SGD), []
    strategy = EASGDStrategy(tau=2, **options)

    def on_train_start() -> None:
        all_reduce = strategy._fit.exchange._link.all_reduce
        groups = [all_reduce._control, all_reduce.level.data]
        seen.append((len(distributed_c10d._world.pg_map), dist.group.WORLD in groups))

    module.on_train_start = on_train_start
    trainer(2, strategy).fit(module, loader(rank, 3))
    return seen[0]


@pytest.mark.parametrize(("options", "groups"), [({}, 2), ({"compression": "int8"}, 3)])
def test_exchanges_share_no_process_group_and_none_is_idle(
    options: dict[str, Any], groups: int
) -> None:
    assert run_workers(ways, options, workers=2) == [(groups, False)] * 2


def overflowing(rank: int) -> Any:
    """Worker 1's statistics overflow, as fp16 activations make them, while its weights do not."""
    module, seen = WithNorm(SGD), {}

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            module.norm.running_var.fill_(float("inf"))

    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    module.on_train_batch_start = on_train_batch_start
    module.on_train_epoch_end = lambda: seen.update({"own": module.norm.running_var.numpy().copy()})
    trainer(2, EASGDStrategy(tau=2)).fit(module, loader(rank, 8, torch.float32))
    return seen["own"], {k: v.numpy() for k, v in module.state_dict().items()}


def test_statistics_that_overflow_do_not_reach_the_center() -> None:
    for own, state in run_workers(overflowing, workers=2):
        assert np.isfinite(own).all()
        assert state.pop("mask").tolist() == [0.0, float("-inf")]
        assert all(np.isfinite(value).all() for value in state.values())


def poisoned(rank: int, sick: tuple[int, ...], make: Any, accumulate: int) -> Any:
    module, strategy = WithNorm(make), EASGDStrategy(tau=2)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank in sick and batch_idx == 3:
            with torch.no_grad():
                module.w[0, 0] = float("nan")
                module.norm.running_mean[0] = float("nan")

    module.on_train_batch_start = on_train_batch_start
    centers = {}

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        centers[batch_idx] = strategy.center_state_dict()["w"].numpy()

    module.on_train_batch_end = on_train_batch_end
    fitting = trainer(2, strategy, accumulate_grad_batches=accumulate)
    error = None
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: warned.append(str(message)))
        try:
            fitting.fit(module, loader(rank, 12, torch.float32))
        except RuntimeError as raised:
            error = f"{type(raised).__name__}: {raised}"
    warned = [w for w in warned if "worker(s)" in w]
    center = {k: v.numpy() for k, v in strategy.center_state_dict().items()}
    return centers, center, weights(module), strategy.telemetry.non_finite, warned, error


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [NESTEROV, ADAMW], ids=["nesterov", "adamw"])
def test_a_worker_with_nan_weights_restarts_from_the_center(make: Any, accumulate: int) -> None:
    results = run_workers(poisoned, (1,), make, accumulate, workers=2)
    for centers, center, worker, count, _, error in results:
        assert error is None
        assert count == 1
        assert all(np.isfinite(value).all() for value in [*center.values(), *worker.values()])
        assert all(np.isfinite(value).all() for value in centers.values())
        assert not np.array_equal(centers[5], centers[11])
    assert (
        f"step {4 // accumulate} the weights of worker(s) [1] were NaN or infinite"
        in results[0][4][0]
    )
    assert results[1][4] == []


def test_training_stops_when_every_worker_has_nan_and_the_center_stays_finite() -> None:
    for centers, center, _, count, _, error in run_workers(poisoned, (0, 1), SGD, 1, workers=2):
        assert error is not None
        assert error.startswith("NonFiniteError: At step 4 the weights of every worker")
        assert count == 2
        np.testing.assert_array_equal(center["w"], centers[3])
        assert np.isfinite(center["w"]).all()
