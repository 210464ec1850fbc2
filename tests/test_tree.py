"""Groups with centers of their own: trees of two levels and more, against a slow reference.

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
from staying import run_workers
from toy import Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, EASGDStrategy, Groups
from lightning_easgd.algorithms.groups import arrange_levels

MEMBERS = {4: 2, 8: [[7, 3], [0, 1, 5], [2, 4, 6]]}
"""By the number of workers; the second in no order, and of different sizes."""

OUTER = [[7, 3, 0], [1, 2, 4, 5, 6]]
INNER = [[5], [1, 2], [4, 6], [0, 3], [7]]
"""In no order, and of different sizes: the first of OUTER has two of them, the second three."""

TWO = Groups(2, tau=2)
THREE = Groups(OUTER, tau=2, inside=Groups(INNER))
FOUR = Groups(OUTER, tau=4, inside=Groups(INNER, tau=2, inside=Groups(1, beta=0.7)))


@dataclass
class Case:
    """How a tree trains."""

    groups: Groups
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

    def levels(self, workers: int) -> list[list[list[int]]]:
        return arrange_levels(self.groups, [rank // 4 for rank in range(workers)])


def two(
    members: Any = None, options: dict[str, Any] | None = None, /, *, inside: Any = None, **how: Any
) -> Callable[[int], Case]:
    """A tree of two levels, for any number of workers."""
    inside = inside or {"tau": 2}
    return lambda workers: Case(Groups(members or MEMBERS[workers], **inside), options or {}, **how)


TWO_LEVELS = {
    "sgd": two(optimizer="sgd"),
    "nesterov": two(),
    "nesterov, blocking": two(None, {"overlap": False}),
    "adamw": two(optimizer="adamw"),
    "accumulated gradients": two(accumulate=3),
    "every step": two(inside={"tau": 1}),
    "as often": two(None, {"tau": 3, "beta": 1.2}, inside={"tau": 3, "beta": 1.1}),
    "alpha": two(None, {"alpha": 0.2}, inside={"tau": 2, "alpha": 0.3}),
    "rho inside": two(inside={"tau": 2, "rho": 0.2 / LR}),
    "momentum of the center": two(None, {"algorithm": EASGD(0.6)}),
    "no last exchange": two(None, {"final_exchange": False}),
    "one group": two([[0, 1, 2, 3]]),
    "groups of one": two([[0], [1, 3], [2]]),
    "fewer batches in groups": two(missing=(0, 5)),
    "fewer batches in groups, blocking": two(None, {"overlap": False}, missing=(0, 5)),
    "fewer batches, adamw": two(missing=(6, 0, 9), optimizer="adamw"),
    "fewer batches in a whole group": two(missing=(2, 9, 0, 0), steps=17),
    "fewer batches everywhere": two(missing=(2, 9, 5, 0), steps=17),
    "a group that goes on late": two(missing=(0, 0, 8, 9), steps=11, epochs=2, optimizer="sgd"),
    "a poisoned worker": two(optimizer="sgd", sick=((2, 8),)),
    "a poisoned worker between": two(optimizer="sgd", sick=((1, 6),)),
    "a poisoned group": two(optimizer="sgd", sick=((2, 6), (3, 6))),
}

LARGE = ("nesterov", "nesterov, blocking", "fewer batches everywhere")
"""Those of two levels that 8 workers train, too."""

IN_INNER = (0, 3, 5, 4, 0, 0, 6, 0)
"""Missing batches: of 4 workers, each beside one that has them."""

ALL_INNER = (9, 5, 6, 9, 0, 0, 4, 0)
"""The same, of all workers of two of the innermost groups."""

OUTER_TOO = (3, 9, 8, 0, 11, 7, 5, 4)
"""The same, of all in one of the outermost."""

BLOCKING = {"overlap": False}
SGD_TWICE = {"optimizer": "sgd", "epochs": 2}
FOUR_UNEVEN = {"missing": OUTER_TOO, "steps": 23, "epochs": 2}

DEEPER = {
    "deep, nesterov": Case(THREE, steps=42),
    "deep, nesterov, blocking": Case(THREE, BLOCKING, steps=42),
    "deep, adamw": Case(THREE, optimizer="adamw"),
    "deep, accumulated gradients": Case(THREE, accumulate=3, optimizer="sgd"),
    "deep, strengths": Case(
        Groups(OUTER, tau=4, alpha=0.3, inside=Groups(INNER, tau=2, rho=0.2 / LR)),
        {"tau": 8, "alpha": 0.2, "algorithm": EASGD(0.6)},
        steps=29,
    ),
    "deep, as often": Case(Groups(OUTER, tau=2, inside=Groups(INNER, tau=2, beta=0.8)), {"tau": 2}),
    "deep, numbers": Case(Groups(4, tau=2, inside=Groups(2)), optimizer="sgd"),
    "deep, machines": Case(Groups("node", tau=2, inside=Groups(2)), {"final_exchange": False}),
    "deep, one group": Case(Groups(8, tau=2, inside=Groups("node"))),
    "four levels": Case(FOUR, {"tau": 4}),
    "four levels, blocking": Case(FOUR, {"tau": 4} | BLOCKING),
    "deep, fewer batches": Case(THREE, missing=IN_INNER),
    "deep, fewer batches, blocking": Case(THREE, BLOCKING, missing=IN_INNER),
    "fewer in inner groups": Case(THREE, missing=ALL_INNER, **SGD_TWICE),
    "fewer in inner groups, blocking": Case(THREE, BLOCKING, missing=ALL_INNER, **SGD_TWICE),
    "fewer in an outer group": Case(THREE, missing=OUTER_TOO, **SGD_TWICE),
    "fewer, four levels": Case(FOUR, {"tau": 8}, **FOUR_UNEVEN),
    "fewer, four levels, blocking": Case(FOUR, {"tau": 8} | BLOCKING, **FOUR_UNEVEN),
    "deep, a poisoned worker": Case(THREE, optimizer="sgd", sick=((2, 8), (4, 5))),
    "a poisoned inner group": Case(THREE, optimizer="sgd", sick=((1, 5), (2, 5), (7, 4))),
    "a poisoned outer group": Case(THREE, optimizer="sgd", sick=((0, 5), (3, 5), (7, 5))),
    "a poisoned group of one that waits": Case(
        THREE, optimizer="sgd", sick=((0, 5), (3, 5)), missing=(8, 0, 0, 8, 0, 0, 0, 0)
    ),
}

CASES = {
    4: {name: make(4) for name, make in TWO_LEVELS.items()},
    8: {name: TWO_LEVELS[name](8) for name in LARGE} | DEEPER,
}
"""By the number of workers, four on a machine."""

RUNS = [(workers, name) for workers, cases in CASES.items() for name in cases]


def train(rank: int, workers: int, case: Case) -> Any:
    """The center in the end, those of the groups and the worker's last weights, and telemetry."""
    module, levels, own = Toy(OPTIMIZERS[case.optimizer]), [], {}
    strategy = EASGDStrategy(**{"tau": 4, "groups": case.groups, **case.options})

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if (rank, batch_idx + case.groups.levels[-1].tau) in case.sick:
            module.w.data[0, 0] = float("nan")

    def on_train_epoch_end() -> None:
        own.update(weights(module))
        strategy._fit.exchange.drain()
        levels[:] = middles(strategy)

    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = on_train_epoch_end
    options = {"max_epochs": case.epochs, "accumulate_grad_batches": case.accumulate}
    fitting = trainer(4, strategy, num_nodes=workers // 4, **options)
    fitting.fit(module, loader(rank, case.own(rank)))
    return weights(module), levels, own, strategy.telemetry


def train_all(rank: int, workers: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    os.environ.update(LOCAL_RANK=str(rank % 4), NODE_RANK=str(rank // 4))
    return {name: train(rank, workers, case) for name, case in CASES[workers].items()}


@cache
def trained(workers: int) -> list[dict[str, Any]]:
    return run_workers(train_all, workers, workers=workers, timeout=170)


def rate(groups: Groups) -> Callable[[int, str], float]:
    if groups.rho is not None:
        return lambda participants, name: groups.rho * LR
    if groups.alpha is not None:
        return lambda participants, name: groups.alpha
    return lambda participants, name: (groups.beta or 0.9) / participants


def expected(case: Case, workers: int) -> Any:
    data, levels = [batches(rank, case.own(rank)) for rank in range(workers)], case.levels(workers)
    longest = max(map(len, data))
    if case.epochs > 1:
        data = [(own + [None] * (longest - len(own))) * case.epochs for own in data]
    options = {"tau": 4, "beta": 0.9, **case.options}
    return reference.tree(
        initial_weights(),
        data,
        reference_optimizers(case.optimizer, lambda name, t: LR, workers),
        levels,
        tau=options["tau"],
        alpha=options.get("alpha", options["beta"] / len(levels[0])),
        inside=[(groups.tau, rate(groups)) for groups in case.groups.levels],
        accumulate=case.accumulate,
        final_exchange=options.get("final_exchange", True),
        center_momentum=getattr(options.get("algorithm"), "center_momentum", 0.0),
        sick=case.sick,
    )


def close(got: Any, wanted: Any) -> None:
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_a_tree_is_that_of_the_reference(workers: int, name: str) -> None:
    center, *_ = expected(CASES[workers][name], workers)
    for run in trained(workers):
        close(run[name][0], center)


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_every_level_is_that_of_the_reference_before_the_last_exchange(
    workers: int, name: str
) -> None:
    case = CASES[workers][name]
    before_it = replace(case, options={**case.options, "final_exchange": False})
    _, wanted, iterates = expected(before_it, workers)
    for rank, run in enumerate(trained(workers)):
        _, found, own, _ = run[name]
        for parts, centers, mine in zip(case.levels(workers), wanted, found, strict=True):
            (number,) = [i for i, ranks in enumerate(parts) if rank in ranks]
            close(mine, centers[number])
        if case.optimizer != "nesterov":  # whose parameter is the look-ahead point
            close(own, iterates[rank])


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_centers_are_equal_bit_for_bit_where_they_are_shared(workers: int, name: str) -> None:
    runs = [run[name] for run in trained(workers)]
    assert all(bits(center) == bits(runs[0][0]) for center, *_ in runs)
    case = CASES[workers][name]
    for depth, parts in enumerate(case.levels(workers)):
        found = [str(bits(levels[depth])) for _, levels, *_ in runs]
        for ranks in parts:
            assert len({found[rank] for rank in ranks}) == 1
        assert len(set(found)) == len(parts)
    if not case.sick or workers == 4:  # members that start again with no batch left stay equal
        assert len({str(bits(own)) for _, _, own, _ in runs}) == workers


@pytest.mark.parametrize(
    ("workers", "name"), [(w, name) for w, name in RUNS if f"{name}, blocking" in CASES[w]]
)
def test_overlap_changes_no_bit_at_any_level(workers: int, name: str) -> None:
    for run in trained(workers):
        behind, blocking = run[name], run[f"{name}, blocking"]
        for one, other in zip(behind[1], blocking[1], strict=True):
            assert bits(one) == bits(other)
        assert bits(behind[0]) == bits(blocking[0])
        assert bits(behind[2]) == bits(blocking[2])


def test_bytes_are_counted_by_level() -> None:
    header = 8 * 8
    for rank, run in enumerate(trained(4)):
        telemetry = run["sgd"][3]
        # At steps 4, 8, 12 and the end with the other group, at 2, 4, ... and the end inside. The
        # sum of two has 8 numbers; that of groups is passed on inside, which is 64 bytes for one.
        assert (telemetry.exchanges, telemetry.exchanges_inside) == (4, 7)
        # With every exchange, and before the end, 3 headers: one to the other member.
        between = 5 * 2 * header + (4 * 64 if rank in (0, 2) else 0)
        inside = 5 * header + 4 * 32 + 8 * header + 7 * 64
        assert telemetry.bytes_between == between
        assert telemetry.bytes_inside == inside
        assert telemetry.bytes_sent == inside + between
    assert [run["a poisoned worker"][3].non_finite for run in trained(4)] == [0, 0, 1, 1]
    assert [run["a poisoned group"][3].non_finite for run in trained(4)] == [1, 1, 3, 3]


def test_bytes_are_counted_by_level_in_a_deeper_tree() -> None:
    header = 8 * 8
    for rank, run in enumerate(trained(8)):
        telemetry = run["deep, numbers"][3]
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


def conserved(rank: int, workers: int, groups: Groups) -> Any:
    """The worker, the centers of its groups and the center at steps 5 to 20; nothing trains."""
    module, found = Toy(OPTIMIZERS["sgd"]), []
    strategy = EASGDStrategy(tau=4, groups=groups)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx >= 5:
            module.trainer.optimizers[0].param_groups[0]["lr"] = 0.0
            center = strategy.center_state_dict()["w"].numpy()
            levels = [level["w"] for level in middles(strategy)]
            found.append([x.copy() for x in (module.w.detach().numpy(), *levels, center)])

    module.on_train_batch_start = on_train_batch_start
    trainer(workers, strategy).fit(module, loader(rank, 21))
    return np.array(found)


@pytest.mark.parametrize(
    ("workers", "groups"),
    [(4, Groups([[0, 1, 2], [3]], tau=2)), (8, THREE)],
    ids=["two levels", "three"],
)
def test_exchanges_keep_the_sum_over_all_levels(workers: int, groups: Groups) -> None:
    runs = run_workers(conserved, workers, groups, workers=workers)
    sums = sum(run[:, 0] for run in runs) + runs[0][:, -1]
    for depth, parts in enumerate(arrange_levels(groups, [0] * workers), start=1):
        sums = sums + sum(runs[ranks[0]][:, depth] for ranks in parts)
    np.testing.assert_allclose(sums, np.broadcast_to(sums[0], sums.shape), rtol=1e-12)
    for run in runs:
        assert all(np.abs(level - level[0]).max() > 1e-4 for level in np.swapaxes(run, 0, 1))


def hurried(rank: int, workers: int, slow: list[int], options: Any, counts: list[int]) -> Any:
    """Two epochs of different lengths, where all workers are as fast, and where one is slow."""
    found = []
    for who in (None, *slow):
        module = Toy(OPTIMIZERS["adamw"])
        module.on_train_batch_start = lambda batch, batch_idx, wait=who == rank: time.sleep(
            0.01 * wait
        )
        strategy = EASGDStrategy(**options)
        trainer(workers, strategy, max_epochs=2).fit(module, loader(rank, counts[rank]))
        found.append(bits(weights(module)))
    return found


@pytest.mark.parametrize(
    ("workers", "slow", "options", "counts"),
    [
        (4, [1, 2], {"tau": 4, "groups": TWO}, [11, 3, 6, 7]),
        (8, [2, 7], {"tau": 8, "groups": FOUR}, [23 - missing for missing in OUTER_TOO]),
    ],
    ids=["two levels", "four"],
)
def test_whoever_is_slow_changes_no_bit(
    workers: int, slow: list[int], options: Any, counts: list[int]
) -> None:
    runs = run_workers(hurried, workers, slow, options, counts, workers=workers)
    assert all(center == runs[0][0] for run in runs for center in run)


def thawed(rank: int, workers: int, groups: Groups) -> Any:
    module, own = Thawing(), {}
    module.on_train_epoch_end = lambda: own.update(bits(weights(module)))
    fitting = trainer(workers, EASGDStrategy(tau=4, groups=groups), val_check_interval=3)
    fitting.fit(module, loader(rank, 26, torch.float32), loader(0, 1, torch.float32))
    center = {key: value.numpy().copy() for key, value in module.state_dict().items()}
    return own, bits(center), module.seen


@pytest.mark.parametrize(("workers", "groups"), [(4, TWO), (8, THREE)], ids=["two levels", "three"])
def test_validations_statistics_and_unfrozen_parameters_are_the_uppermost_centers(
    workers: int, groups: Groups
) -> None:
    runs = run_workers(thawed, workers, groups, workers=workers)
    assert all(center == runs[0][1] and seen == runs[0][2] for _, center, seen in runs)
    assert len({str(own) for own, *_ in runs}) == workers
    assert len({seen["b"] for seen in runs[0][2]}) > 2
    assert runs[0][1]["b"] not in {own["b"] for own, *_ in runs}
