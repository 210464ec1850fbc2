"""Groups within groups, all with centers of their own: trees of three levels and more.

Workers train all cases one after another, so that they are started once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import LR, OPTIMIZERS, reference_optimizers
from inside import middles
from modules import Thawing
from processes import run_workers
from toy import Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, EASGDStrategy, Groups
from lightning_easgd.groups import arrange_levels

WORKERS = 8
OUTER = [[7, 3, 0], [1, 2, 4, 5, 6]]
INNER = [[5], [1, 2], [4, 6], [0, 3], [7]]
"""In no order, and of different sizes: the first of OUTER has two of them, the second three."""

THREE = Groups(OUTER, tau=2, inside=Groups(INNER))
FOUR = Groups(OUTER, tau=4, inside=Groups(INNER, tau=2, inside=Groups(1, beta=0.7)))


@dataclass
class Case:
    """How a tree trains."""

    groups: Groups = THREE
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "nesterov"
    steps: int = 14
    accumulate: int = 1
    epochs: int = 1
    missing: tuple[int, ...] = (0,)
    """Batches that each worker, in turn, has less than the others."""
    sick: tuple[tuple[int, int], ...] = ()
    """Workers whose weights are poisoned, and the steps of the exchanges that find them."""

    def own(self, rank: int) -> int:
        return self.steps * self.accumulate - self.missing[rank % len(self.missing)]

    @property
    def levels(self) -> list[list[list[int]]]:
        return arrange_levels(self.groups, [rank // 4 for rank in range(WORKERS)])


IN_INNER = (0, 3, 5, 4, 0, 0, 6, 0)
"""Missing batches: of 4 workers, each beside one that has them."""

ALL_INNER = (9, 5, 6, 9, 0, 0, 4, 0)
"""The same, of all workers of two of the innermost groups."""

OUTER_TOO = (3, 9, 8, 0, 11, 7, 5, 4)
"""The same, of all in one of the outermost."""

CASES = {
    "nesterov": Case(steps=84),
    "nesterov, blocking": Case(steps=84, options={"overlap": False}),
    "adamw": Case(optimizer="adamw"),
    "accumulated gradients": Case(accumulate=3, optimizer="sgd"),
    "strengths": Case(
        Groups(OUTER, tau=4, alpha=0.3, inside=Groups(INNER, tau=2, rho=0.2 / LR)),
        {"tau": 8, "alpha": 0.2, "algorithm": EASGD(0.6)},
        steps=29,
    ),
    "as often": Case(Groups(OUTER, tau=2, inside=Groups(INNER, tau=2, beta=0.8)), {"tau": 2}),
    "numbers": Case(Groups(4, tau=2, inside=Groups(2)), optimizer="sgd"),
    "machines": Case(Groups("node", tau=2, inside=Groups(2)), {"final_exchange": False}),
    "one group": Case(Groups(8, tau=2, inside=Groups("node"))),
    "four levels": Case(FOUR, {"tau": 4}),
    "four levels, blocking": Case(FOUR, {"tau": 4, "overlap": False}),
    "fewer batches": Case(missing=IN_INNER),
    "fewer batches, blocking": Case(missing=IN_INNER, options={"overlap": False}),
    "fewer in inner groups": Case(missing=ALL_INNER, epochs=2, optimizer="sgd"),
    "fewer in inner groups, blocking": Case(
        missing=ALL_INNER, epochs=2, optimizer="sgd", options={"overlap": False}
    ),
    "fewer in an outer group": Case(missing=OUTER_TOO, epochs=2, optimizer="sgd"),
    "fewer, four levels": Case(FOUR, {"tau": 8}, missing=OUTER_TOO, steps=23, epochs=2),
    "fewer, four levels, blocking": Case(
        FOUR, {"tau": 8, "overlap": False}, missing=OUTER_TOO, steps=23, epochs=2
    ),
    "a poisoned worker": Case(optimizer="sgd", sick=((2, 8), (4, 5))),
    "a poisoned inner group": Case(optimizer="sgd", sick=((1, 5), (2, 5), (7, 4))),
    "a poisoned outer group": Case(optimizer="sgd", sick=((0, 5), (3, 5), (7, 5))),
    "a poisoned group of one that waits": Case(
        optimizer="sgd", sick=((0, 5), (3, 5)), missing=(8, 0, 0, 8, 0, 0, 0, 0)
    ),
}


def train(rank: int, case: Case) -> Any:
    """The center in the end, those of the groups and the worker's last weights, and telemetry."""
    module, levels, own = Toy(OPTIMIZERS[case.optimizer]), [], {}
    strategy = EASGDStrategy(**{"tau": 4, "groups": case.groups, **case.options})

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if (rank, batch_idx + 1) in case.sick:
            module.w.data[0, 0] = float("nan")

    def on_train_epoch_end() -> None:
        own.update(weights(module))
        strategy._fit.exchange.drain()
        levels[:] = middles(strategy)

    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = on_train_epoch_end
    options = {"max_epochs": case.epochs, "accumulate_grad_batches": case.accumulate}
    fitting = trainer(4, strategy, num_nodes=2, **options)
    fitting.fit(module, loader(rank, case.own(rank)))
    return weights(module), levels, own, strategy.telemetry


def train_all(rank: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    os.environ.update(LOCAL_RANK=str(rank % 4), NODE_RANK=str(rank // 4))
    return {name: train(rank, case) for name, case in CASES.items()}


@cache
def trained() -> list[dict[str, Any]]:
    return run_workers(train_all, workers=WORKERS, timeout=170)


def rate(groups: Groups) -> Callable[[int, str], float]:
    if groups.rho is not None:
        return lambda participants, name: groups.rho * LR
    if groups.alpha is not None:
        return lambda participants, name: groups.alpha
    return lambda participants, name: (groups.beta or 0.9) / participants


def expected(case: Case) -> Any:
    data = [batches(rank, case.own(rank)) for rank in range(WORKERS)]
    longest = max(map(len, data))
    data = [(own + [None] * (longest - len(own))) * case.epochs for own in data]
    options = {"tau": 4, **case.options}
    return reference.tree(
        initial_weights(),
        data,
        reference_optimizers(case.optimizer, lambda name, t: LR, WORKERS),
        case.levels,
        tau=options["tau"],
        alpha=options.get("alpha", 0.9 / len(case.levels[0])),
        inside=[(groups.tau, rate(groups)) for groups in case.groups.levels],
        accumulate=case.accumulate,
        final_exchange=options.get("final_exchange", True),
        center_momentum=getattr(options.get("algorithm"), "center_momentum", 0.0),
        sick=case.sick,
    )


def close(got: Any, wanted: Any) -> None:
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_a_tree_of_any_depth_is_that_of_the_reference(name: str) -> None:
    center, *_ = expected(CASES[name])
    for run in trained():
        close(run[name][0], center)


@pytest.mark.parametrize("name", CASES)
def test_every_level_is_that_of_the_reference_before_the_last_exchange(name: str) -> None:
    case = CASES[name]
    _, wanted, iterates = expected(replace(case, options={**case.options, "final_exchange": False}))
    for rank, run in enumerate(trained()):
        _, found, own, _ = run[name]
        assert len(found) == len(case.levels)
        for parts, centers, mine in zip(case.levels, wanted, found, strict=True):
            (number,) = [i for i, ranks in enumerate(parts) if rank in ranks]
            close(mine, centers[number])
        if case.optimizer != "nesterov":  # whose parameter is the look-ahead point
            close(own, iterates[rank])


@pytest.mark.parametrize("name", CASES)
def test_centers_are_equal_bit_for_bit_where_they_are_shared(name: str) -> None:
    runs = [run[name] for run in trained()]
    assert all(bits(center) == bits(runs[0][0]) for center, *_ in runs)
    for depth, parts in enumerate(CASES[name].levels):
        found = [str(bits(levels[depth])) for _, levels, *_ in runs]
        for ranks in parts:
            assert len({found[rank] for rank in ranks}) == 1
        assert len(set(found)) == len(parts)
    if not CASES[name].sick:  # members that start again and have no batch left stay equal
        assert len({str(bits(own)) for _, _, own, _ in runs}) == WORKERS


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}, blocking" in CASES])
def test_overlap_changes_no_bit_at_any_level(name: str) -> None:
    for run in trained():
        behind, blocking = run[name], run[f"{name}, blocking"]
        for one, other in zip(behind[1], blocking[1], strict=True):
            assert bits(one) == bits(other)
        assert bits(behind[0]) == bits(blocking[0])
        assert bits(behind[2]) == bits(blocking[2])


def test_bytes_are_counted_per_level() -> None:
    header = 8 * 8
    for rank, run in enumerate(trained()):
        telemetry = run["numbers"][3]
        # Between the outermost groups at steps 4, 8, 12 and the end; in them at 2, 4, ... and the
        # end, between two of the innermost; in these at every step but the first, and at the end.
        assert (telemetry.exchanges, telemetry.exchanges_inside) == (4, 7 + 14)
        # A sum of two has 8 numbers; what the first members have they pass on, to 3 and to 1 more.
        # With every exchange, and before the end, a header to every other worker of the level.
        outer = 4 * 48 + (4 * 64 if rank % 4 == 0 else 0)
        inner = 7 * 32 + (7 * 64 if rank % 2 == 0 else 0)
        levels = [5 * 7 * header + outer, 8 * 3 * header + inner, 15 * header + 14 * 64]
        assert telemetry.bytes_per_level == levels
        assert telemetry.bytes_sent == telemetry.bytes_received == sum(levels)
        assert telemetry.bytes_between == 5 * 4 * header + (4 * 64 if rank % 4 == 0 else 0)
        curves = telemetry.metrics()
        assert [curves[f"bytes_level_{level}"] for level in range(3)] == levels


def conserved(rank: int) -> Any:
    """The worker, the centers of its groups and the center at steps 5 to 20; nothing trains."""
    module, found = Toy(OPTIMIZERS["sgd"]), []
    strategy = EASGDStrategy(tau=4, groups=THREE)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx >= 5:
            module.trainer.optimizers[0].param_groups[0]["lr"] = 0.0
            center = strategy.center_state_dict()["w"].numpy()
            levels = [level["w"] for level in middles(strategy)]
            found.append([x.copy() for x in (module.w.detach().numpy(), *levels, center)])

    module.on_train_batch_start = on_train_batch_start
    trainer(WORKERS, strategy).fit(module, loader(rank, 21))
    return np.array(found)


def test_exchanges_keep_the_sum_over_all_levels() -> None:
    runs = run_workers(conserved, workers=WORKERS)
    sums = sum(run[:, 0] for run in runs) + runs[0][:, 3]
    for depth, parts in enumerate([OUTER, INNER], start=1):
        sums = sums + sum(runs[ranks[0]][:, depth] for ranks in parts)
    np.testing.assert_allclose(sums, np.broadcast_to(sums[0], sums.shape), rtol=1e-12)
    for run in runs:
        assert all(np.abs(level - level[0]).max() > 1e-4 for level in np.swapaxes(run, 0, 1))


def hurried(rank: int) -> Any:
    """Two epochs of different lengths, where all workers are as fast, and where one is slow."""
    found = []
    for slow in (None, 0, 2, 5, 7):
        module = Toy(OPTIMIZERS["adamw"])
        module.on_train_batch_start = lambda batch, batch_idx, wait=slow == rank: time.sleep(
            0.01 * wait
        )
        strategy = EASGDStrategy(tau=8, groups=FOUR)
        trainer(WORKERS, strategy, max_epochs=2).fit(module, loader(rank, 23 - OUTER_TOO[rank]))
        found.append(bits(weights(module)))
    return found


def test_whoever_is_slow_changes_no_bit() -> None:
    runs = run_workers(hurried, workers=WORKERS)
    assert all(center == runs[0][0] for run in runs for center in run)


def thawed(rank: int) -> Any:
    module, own = Thawing(), {}
    module.on_train_epoch_end = lambda: own.update(bits(weights(module)))
    strategy = EASGDStrategy(tau=4, groups=THREE)
    fitting = trainer(WORKERS, strategy, val_check_interval=3)
    fitting.fit(module, loader(rank, 26, torch.float32), loader(0, 1, torch.float32))
    center = {key: value.numpy().copy() for key, value in module.state_dict().items()}
    return own, bits(center), module.seen


def test_validations_statistics_and_unfrozen_parameters_are_the_uppermost_centers() -> None:
    runs = run_workers(thawed, workers=WORKERS)
    assert all(center == runs[0][1] and seen == runs[0][2] for _, center, seen in runs)
    assert len({str(own) for own, *_ in runs}) == WORKERS
    assert len({seen["b"] for seen in runs[0][2]}) > 2
    assert runs[0][1]["b"] not in {own["b"] for own, *_ in runs}
