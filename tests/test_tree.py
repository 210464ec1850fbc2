"""Groups with centers of their own, the two-level Tree EASGD, against a slow reference.

Workers train all cases one after another, so that they are started once.
"""

from __future__ import annotations

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
from modules import Thawing
from processes import run_workers
from toy import Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, EASGDStrategy, Groups
from lightning_easgd.groups import arrange

MEMBERS = {4: 2, 8: [[7, 3], [0, 1, 5], [2, 4, 6]]}
"""By the number of workers; the second in no order, and of different sizes."""


@dataclass
class Case:
    """How a tree trains."""

    inside: dict[str, Any] = field(default_factory=lambda: {"tau": 2})
    options: dict[str, Any] = field(default_factory=dict)
    members: Any = None
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

    def groups(self, workers: int) -> Any:
        return self.members or MEMBERS[workers]


CASES = {
    "sgd": Case(optimizer="sgd"),
    "nesterov": Case(),
    "nesterov, blocking": Case(options={"overlap": False}),
    "adamw": Case(optimizer="adamw"),
    "accumulated gradients": Case(accumulate=3),
    "every step": Case({"tau": 1}),
    "as often": Case({"tau": 3, "beta": 1.1}, {"tau": 3, "beta": 1.2}),
    "alpha": Case({"tau": 2, "alpha": 0.3}, {"alpha": 0.2}),
    "rho inside": Case({"tau": 2, "rho": 0.2 / LR}),
    "momentum of the center": Case(options={"algorithm": EASGD(0.6)}),
    "no last exchange": Case(options={"final_exchange": False}),
    "one group": Case(members=[[0, 1, 2, 3]]),
    "groups of one": Case(members=[[0], [1, 3], [2]]),
    "fewer batches in groups": Case(missing=(0, 5)),
    "fewer batches in groups, blocking": Case(options={"overlap": False}, missing=(0, 5)),
    "fewer batches, adamw": Case(missing=(6, 0, 9), optimizer="adamw"),
    "fewer batches in a whole group": Case(missing=(2, 9, 0, 0), steps=17),
    "fewer batches everywhere": Case(missing=(2, 9, 5, 0), steps=17),
    "a group that goes on late": Case(missing=(0, 0, 8, 9), steps=11, epochs=2, optimizer="sgd"),
    "a poisoned worker": Case(optimizer="sgd", sick=((2, 8),)),
    "a poisoned worker between": Case(optimizer="sgd", sick=((1, 6),)),
    "a poisoned group": Case(optimizer="sgd", sick=((2, 6), (3, 6))),
}

SOME = ("nesterov", "nesterov, blocking", "rho inside", "every step", "fewer batches everywhere")
"""Those that 8 workers train, too."""

RUNS = [(4, name) for name in CASES] + [(8, name) for name in SOME]


def train(rank: int, workers: int, case: Case) -> Any:
    """The center in the end, the group's and the worker's own last weights, and telemetry."""
    module, own, middle = Toy(OPTIMIZERS[case.optimizer]), {}, {}
    groups = Groups(case.groups(workers), **case.inside)
    strategy = EASGDStrategy(**{"tau": 4, "groups": groups, **case.options})

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if (rank, batch_idx + 2) in case.sick:
            module.w.data[0, 0] = float("nan")

    def on_train_epoch_end() -> None:
        own.update(weights(module))
        strategy._fit.exchange.drain()
        values = strategy._fit.center.group.values()["center"].items()
        middle.update({name: value.numpy().copy() for name, value in values})

    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = on_train_epoch_end
    options = {"max_epochs": case.epochs, "accumulate_grad_batches": case.accumulate}
    fitting = trainer(workers, strategy, **options)
    fitting.fit(module, loader(rank, case.own(rank)))
    return weights(module), middle, own, strategy.telemetry


def train_all(rank: int, workers: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    return {name: train(rank, workers, CASES[name]) for w, name in RUNS if w == workers}


@cache
def trained(workers: int) -> list[dict[str, Any]]:
    return run_workers(train_all, workers, workers=workers, timeout=170)


def rate_inside(case: Case) -> Callable[[int, str], float]:
    options = case.inside
    if "rho" in options:
        return lambda size, name: options["rho"] * LR
    if "alpha" in options:
        return lambda size, name: options["alpha"]
    return lambda size, name: options.get("beta", 0.9) / size


def expected(case: Case, workers: int) -> Any:
    groups = arrange(case.groups(workers), [0] * workers)
    data = [batches(rank, case.own(rank)) for rank in range(workers)]
    if case.epochs > 1:
        longest = max(map(len, data))
        data = [(own + [None] * (longest - len(own))) * case.epochs for own in data]
    options = {"tau": 4, "beta": 0.9, **case.options}
    return reference.tree(
        initial_weights(),
        data,
        reference_optimizers(case.optimizer, lambda name, t: LR, workers),
        [groups],
        tau=options["tau"],
        alpha=options.get("alpha", options["beta"] / len(groups)),
        inside=[(case.inside["tau"], rate_inside(case))],
        accumulate=case.accumulate,
        final_exchange=options.get("final_exchange", True),
        center_momentum=getattr(options.get("algorithm"), "center_momentum", 0.0),
        sick=case.sick,
    )


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_a_tree_is_that_of_the_reference(workers: int, name: str) -> None:
    center, *_ = expected(CASES[name], workers)
    for got, *_ in [run[name] for run in trained(workers)]:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_every_level_is_that_of_the_reference_before_the_last_exchange(
    workers: int, name: str
) -> None:
    case = CASES[name]
    options = {**case.options, "final_exchange": False}
    _, (middles,), iterates = expected(replace(case, options=options), workers)
    groups = arrange(case.groups(workers), [0] * workers)
    for rank, run in enumerate(trained(workers)):
        _, middle, own, _ = run[name]
        (number,) = [i for i, ranks in enumerate(groups) if rank in ranks]
        for key, value in middle.items():
            np.testing.assert_allclose(value, middles[number][key], rtol=1e-9, atol=1e-11)
            if case.optimizer != "nesterov":  # whose parameter is the look-ahead point
                np.testing.assert_allclose(own[key], iterates[rank][key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_centers_are_equal_bit_for_bit_in_a_group_and_workers_are_not(
    workers: int, name: str
) -> None:
    runs = [[bits(state) for state in run[name][:3]] for run in trained(workers)]
    assert all(center == runs[0][0] for center, *_ in runs)
    for ranks in arrange(CASES[name].groups(workers), [0] * workers):
        assert all(runs[rank][1] == runs[ranks[0]][1] for rank in ranks)
    assert len({str(own) for *_, own in runs}) == workers


@pytest.mark.parametrize(
    ("workers", "name"), [(4, "nesterov"), (8, "nesterov"), (4, "fewer batches in groups")]
)
def test_overlap_changes_no_bit_at_any_level(workers: int, name: str) -> None:
    for run in trained(workers):
        behind, blocking = run[name], run[f"{name}, blocking"]
        for one, other in zip(behind[:3], blocking[:3], strict=True):
            assert bits(one) == bits(other)


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


def hurried(rank: int) -> Any:
    """Two epochs of different lengths, where all workers are as fast, and where one is slow."""
    found = []
    for slow in (None, *range(4)):
        module = Toy(OPTIMIZERS["adamw"])
        module.on_train_batch_start = lambda batch, batch_idx, wait=slow == rank: time.sleep(
            0.01 * wait
        )
        strategy = EASGDStrategy(tau=4, groups=Groups([[0, 1], [2, 3]], tau=2))
        trainer(4, strategy, max_epochs=2).fit(module, loader(rank, [11, 3, 6, 7][rank]))
        found.append(bits(weights(module)))
    return found


def test_whoever_is_slow_changes_no_bit() -> None:
    runs = run_workers(hurried, workers=4)
    assert all(center == runs[0][0] for run in runs for center in run)


def conserved(rank: int) -> Any:
    """The worker, its group's center and the center at steps 5 to 20, when nothing trains."""
    module, found = Toy(OPTIMIZERS["sgd"]), []
    strategy = EASGDStrategy(tau=4, groups=Groups([[0, 1, 2], [3]], tau=2))

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx >= 5:
            module.trainer.optimizers[0].param_groups[0]["lr"] = 0.0
            center = strategy.center_state_dict()["w"].numpy()
            middle = strategy._fit.center.group.values()["center"]["w"].numpy()
            found.append([x.copy() for x in (module.w.detach().numpy(), middle, center)])

    module.on_train_batch_start = on_train_batch_start
    trainer(4, strategy).fit(module, loader(rank, 21))
    return np.array(found)


def test_exchanges_keep_the_sum_over_all_levels() -> None:
    runs = run_workers(conserved, workers=4)
    sums = sum(run[:, 0] for run in runs) + runs[0][:, 1] + runs[3][:, 1] + runs[0][:, 2]
    np.testing.assert_allclose(sums, np.broadcast_to(sums[0], sums.shape), rtol=1e-12)
    for run in runs:
        assert all(np.abs(level - level[0]).max() > 1e-4 for level in np.swapaxes(run, 0, 1))


def thawed(rank: int) -> Any:
    module, own = Thawing(), {}
    module.on_train_epoch_end = lambda: own.update(bits(weights(module)))
    strategy = EASGDStrategy(tau=4, groups=Groups(2, tau=2))
    fitting = trainer(4, strategy, val_check_interval=3)
    fitting.fit(module, loader(rank, 26, torch.float32), loader(0, 1, torch.float32))
    center = {key: value.numpy().copy() for key, value in module.state_dict().items()}
    return own, bits(center), module.seen


def test_validations_statistics_and_unfrozen_parameters_are_the_centers() -> None:
    runs = run_workers(thawed, workers=4)
    assert all(center == runs[0][1] and seen == runs[0][2] for _, center, seen in runs)
    assert len({str(own) for own, *_ in runs}) == 4
    assert len({seen["b"] for seen in runs[0][2]}) > 2
    assert runs[0][1]["b"] not in {own["b"] for own, *_ in runs}
