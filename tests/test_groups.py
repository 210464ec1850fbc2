"""Groups of workers: gradients averaged inside, exchanges between, against slow references.

Workers train all cases one after another, so that they are started once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import LR, OPTIMIZERS, reference_optimizers
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ADAMW, Noisy, WithNorm
from staying import run_workers
from toy import Resumable, Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import (
    EASGD,
    SMA,
    AdaptivePeriod,
    Auto,
    ConsensusTarget,
    DiLoCo,
    EASGDStrategy,
    LeaderSGD,
    MDownpour,
    PostLocalSGD,
    SlowMo,
    TopK,
)
from lightning_easgd.algorithms.groups import arrange

GROUPS = {4: 2, 8: [[7, 3], [0, 1, 5], [2, 4, 6]]}
"""As given, by the number of workers; the second in no order, and of different sizes."""


@dataclass
class Case:
    """How groups train, and the reference of the rule; None: elastic averaging."""

    options: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    optimizer: str = "nesterov"
    steps: int = 14
    accumulate: int = 1
    missing: tuple[int, ...] = ()
    """Batches that each worker, in turn, has less than the others."""
    sick: tuple[int, int] | None = None
    """A worker whose weights are poisoned, and the step of the exchange that finds it."""
    clip: float | None = None
    falls: int = 1000
    """The step from which on the learning rate is a fifth."""
    run: Any = None
    """What trains with the reference; None: reference.restarting."""

    def own(self, rank: int) -> int:
        less = self.missing[rank % len(self.missing)] if self.missing else 0
        return self.steps * self.accumulate - less

    def rate(self, step: int) -> float:
        return LR if step < self.falls else LR / 5


CASES = {
    "sgd": Case(optimizer="sgd"),
    "nesterov": Case(),
    "nesterov, blocking": Case({"overlap": False}),
    "adamw": Case(optimizer="adamw"),
    "accumulated gradients": Case(accumulate=3),
    "clipped": Case(clip=0.3),
    "tau=1": Case({"tau": 1}),
    "rho": Case({"rho": 0.2 / LR}),
    "center in host memory": Case({"center_device": "cpu"}),
    "momentum of the center": Case({"algorithm": EASGD(0.6)}),
    "local_sgd": Case({"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd"),
    "downpour": Case({"algorithm": "downpour"}, reference.Downpour(), "sgd"),
    "slowmo": Case({"algorithm": SlowMo(0.9, 0.4)}, reference.SlowMo(0.9, 0.4), "adamw"),
    "diloco": Case({"algorithm": DiLoCo(0.7, 0.9)}, reference.DiLoCo(0.7, 0.9), "sgd"),
    "mdownpour": Case({"algorithm": MDownpour(0.5), "tau": 1}, reference.MDownpour(0.5), "sgd"),
    "a delay": Case({"algorithm": DiLoCo(delay=3)}, reference.DiLoCo(0.7, 0.9, 3, 0.5), "sgd"),
    "leader_sgd": Case(
        {"algorithm": LeaderSGD(0.3)}, reference.LeaderSgd(0.3, 0.9), "sgd", run=reference.following
    ),
    "delayed_sgd": Case(
        {"algorithm": "delayed_sgd"}, reference.DelayedSgd(0.5), "sgd", run=reference.delayed
    ),
    "looking ahead": Case({"algorithm": EASGD(pull=0.4, look_ahead=1)}),
    "fewer batches, delayed_sgd": Case(
        {"algorithm": "delayed_sgd"},
        reference.DelayedSgd(0.5),
        "sgd",
        missing=(0, 4),
        run=reference.delayed,
    ),
    "a poisoned group, delayed_sgd": Case(
        {"algorithm": "delayed_sgd"},
        reference.DelayedSgd(0.5),
        "sgd",
        sick=(2, 8),
        run=reference.delayed,
    ),
    "sma": Case({"algorithm": SMA(0.6)}, optimizer="adamw", falls=5, steps=22),
    "fewer batches in groups": Case(missing=(0, 5)),
    "fewer batches in groups, adamw": Case(missing=(6, 0), optimizer="adamw"),
    "fewer batches everywhere": Case(missing=(2, 0, 5, 3), steps=17),
    "fewer batches, local_sgd": Case(
        {"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd", missing=(0, 4)
    ),
    "fewer batches, a delay": Case(
        {"algorithm": DiLoCo(delay=3)}, reference.DiLoCo(0.7, 0.9, 3, 0.5), "sgd", missing=(0, 5)
    ),
    "fewer batches, sma": Case(
        {"algorithm": SMA(0.6)}, optimizer="adamw", falls=5, steps=22, missing=(13, 0)
    ),
    "a poisoned group": Case(optimizer="sgd", sick=(2, 8)),
    "a poisoned group, local_sgd": Case(
        {"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd", sick=(2, 8)
    ),
}


SOME = (
    *("nesterov", "nesterov, blocking", "clipped", "leader_sgd", "a poisoned group"),
    *("fewer batches everywhere", "fewer batches, local_sgd"),
)
"""Those that 8 workers train, too."""

RUNS = [(4, name) for name in CASES] + [(8, name) for name in SOME]


def lists(workers: int) -> list[list[int]]:
    return arrange(GROUPS[workers], [0] * workers)


def train(rank: int, workers: int, case: Case) -> Any:
    """The center in the end, the worker's own last weights, and telemetry."""
    module, own = Toy(OPTIMIZERS[case.optimizer]), {}
    strategy = EASGDStrategy(**{"tau": 4, "groups": GROUPS[workers], **case.options})

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if case.sick is not None and (rank, batch_idx + 2) == case.sick:
            module.w.data[0, 0] = float("nan")

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        for group in fitting.optimizers[0].param_groups:
            group["lr"] = case.rate(fitting.global_step)

    module.on_train_batch_start = on_train_batch_start
    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = lambda: own.update(weights(module))
    fitting = trainer(
        workers,
        strategy,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
    )
    fitting.fit(module, loader(rank, case.own(rank)))
    return weights(module), own, strategy.telemetry


def train_all(rank: int, workers: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    return {name: train(rank, workers, CASES[name]) for w, name in RUNS if w == workers}


@cache
def trained(workers: int) -> list[dict[str, Any]]:
    return run_workers(train_all, workers, workers=workers, timeout=170)


def expected(case: Case, workers: int) -> reference.State:
    """The center, where each group is one worker with the batches of all of its members."""
    groups = lists(workers)
    data = reference.merged([batches(rank, case.own(rank)) for rank in range(workers)], groups)
    optimizers = reference_optimizers(case.optimizer, lambda name, t: case.rate(t), len(groups))
    if case.clip is not None:
        optimizers = [reference.Clipped(optimizer, case.clip) for optimizer in optimizers]
    sick = None
    if case.sick is not None:
        sick = next(i for i, ranks in enumerate(groups) if case.sick[0] in ranks), case.sick[1]
    start, tau = initial_weights(), case.options.get("tau", 4)
    own = {"tau": tau, "accumulate": case.accumulate, "sick": sick}
    if case.reference is not None:
        run = case.run or reference.restarting
        return run(case.reference, start, data, optimizers, **own)
    center, _ = reference.easgd(
        start,
        data,
        optimizers,
        alpha=lambda name, t: case.options.get("rho", 0.9 / len(groups) / LR) * LR,
        center_momentum=getattr(case.options.get("algorithm"), "center_momentum", 0.0),
        lr_drop=getattr(case.options.get("algorithm"), "lr_drop", None) or 0.0,
        pull=getattr(case.options.get("algorithm"), "pull", None),
        look_ahead=getattr(case.options.get("algorithm"), "look_ahead", 0.0),
        final_exchange=True,
        **own,
    )
    return center


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_a_group_is_one_worker_with_the_batches_of_its_members(workers: int, name: str) -> None:
    center = expected(CASES[name], workers)
    for got, *_ in [run[name] for run in trained(workers)]:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("workers", "name"), RUNS)
def test_members_are_equal_bit_for_bit_and_groups_are_not(workers: int, name: str) -> None:
    own = [bits(run[name][1]) for run in trained(workers)]
    firsts = []
    for ranks in lists(workers):
        assert all(own[rank] == own[ranks[0]] for rank in ranks)
        firsts.append(own[ranks[0]])
    if name != "mdownpour" and "local_sgd" not in name:  # these end with an exchange
        assert all(firsts[0] != other for other in firsts[1:])


@pytest.mark.parametrize("workers", GROUPS)
def test_overlap_changes_no_bit_between_groups(workers: int) -> None:
    for run in trained(workers):
        (behind, own, _), (blocking, blocking_own, _) = run["nesterov"], run["nesterov, blocking"]
        assert bits(behind) == bits(blocking)
        assert bits(own) == bits(blocking_own)


def test_only_the_first_of_a_group_sends_to_other_groups() -> None:
    runs = trained(4)
    for rank, run in enumerate(runs):
        *_, telemetry = run["sgd"]
        header = 8 * 8
        # Headers of 4 exchanges and one before the end. The sum of two groups: 8 numbers.
        between = 5 * 2 * header + (4 * 64 if rank in (0, 2) else 0)
        assert telemetry.bytes_between == between
        # In 14 steps 8 numbers of averaged gradients, and 3 that say so. These also before each
        # exchange and at the end. With every header 2; and 8 that one of two passes on.
        inside = 14 * (64 + 24) + 4 * 24 + 5 * (header + 16) + 4 * 32
        assert telemetry.bytes_inside == inside
        assert telemetry.bytes_sent == inside + between
    assert [run["a poisoned group"][2].non_finite for run in runs] == [1] * 4


COMBINED: list[dict[str, Any]] = [
    *({"compression": codec} for codec in (None, "bf16", "int8", TopK(0.3))),
    *({"compression": codec, "algorithm": "local_sgd"} for codec in ("bf16", "int8")),
    {"algorithm": "diloco", "buffers": "broadcast", "center_average": "ema"},
    {"center_device": "cpu", "compression": "int8", "buffers": "local"},
    {"tau": Auto(max=8), "evaluate_on": "worker"},
    {"tau": AdaptivePeriod(4, sample=2), "alpha": ConsensusTarget(0.02, 0.3)},
]


def combined(rank: int) -> Any:
    """Members' weights and all centers, with codecs, fragments, statistics and validations."""
    found = []
    for options in COMBINED:
        module, own = WithNorm(partial(torch.optim.SGD, lr=0.1)), {}
        module.validation_step = lambda batch, batch_idx: None
        options = {"tau": 4, "groups": 2, "fragments": 2, "bucket_bytes": 40, **options}
        fitting = trainer(4, EASGDStrategy(**options), val_check_interval=3)
        module.on_train_epoch_end = lambda m=module, own=own: own.update(weights(m))
        fitting.fit(module, loader(rank, 11, torch.float32), loader(rank, 1, torch.float32))
        center = {key: value.numpy().copy() for key, value in module.state_dict().items()}
        found.append((bits(own), bits(center)))
    return found


def test_whatever_is_combined_members_and_centers_stay_equal() -> None:
    runs = run_workers(combined, workers=4, timeout=120)
    for case, options in enumerate(COMBINED):
        own = [run[case][0] for run in runs]
        assert own[0] == own[1] != own[2] == own[3], options
        statistics = {"norm.running_mean", "norm.running_var"}
        different = statistics if options.get("buffers") == "local" else set()
        centers = [{k: v for k, v in run[case][1].items() if k not in different} for run in runs]
        assert all(center == centers[0] for center in centers), options


class Slope(Toy):
    """Every step moves a worker by its own constant, wherever it is."""

    def __init__(self, rank: int) -> None:
        super().__init__(partial(torch.optim.SGD, lr=1.0))
        self.more = torch.nn.Parameter(torch.zeros(700, dtype=torch.float64))
        generator = torch.Generator().manual_seed(rank)
        self.step = torch.randn(700, dtype=torch.float64, generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -(self.step @ self.more)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([self.more])


def moved(rank: int) -> Any:
    """How far the center went, by codec."""
    found = {}
    for codec in ("bf16", "int8", TopK(0.3)):
        module = Slope(rank)
        options = {"algorithm": "local_sgd", "tau": 2, "bucket_bytes": 2000}
        strategy = EASGDStrategy(groups=[[0, 1, 2], [3]], compression=codec, **options)
        trainer(4, strategy).fit(module, loader(rank, 15))
        found[str(codec)] = module.more.detach().numpy().copy()
    return module.step.numpy(), found


def test_nothing_is_lost_on_the_way_between_groups() -> None:
    """What a codec rounds arrives in the end; a group counts once, however many are in it."""
    results = run_workers(moved, workers=4)
    steps = [step for step, _ in results]
    mean = (sum(steps[:3]) / 3 + steps[3]) / 2
    for _, found in results:
        for codec, center in found.items():
            np.testing.assert_allclose(center, 15 * mean, atol=1e-9, err_msg=codec)


def with_statistics(rank: int) -> Any:
    """The workers' own statistics before a last exchange that pulls nobody, and the center's."""
    module, own = WithNorm(partial(torch.optim.SGD, lr=0.1)), {}

    def on_train_epoch_end() -> None:
        own.update(mean=module.norm.running_mean.numpy().copy())

    module.on_train_epoch_end = on_train_epoch_end
    strategy = EASGDStrategy(tau=4, groups=[[0, 2], [1]])
    trainer(3, strategy).fit(module, loader(rank, 6, torch.float32))
    return own["mean"], module.norm.running_mean.numpy()


def test_statistics_are_averaged_over_all_workers_whatever_their_groups() -> None:
    runs = run_workers(with_statistics, workers=3)
    mean = np.mean([own for own, _ in runs], axis=0)
    assert not np.array_equal(runs[0][0], runs[2][0])
    for _, center in runs:
        np.testing.assert_allclose(center, mean, rtol=1e-6)


def resumed(rank: int, folder: Path, groups: Any, algorithm: Any, step: int | None) -> Any:
    torch.manual_seed(rank)
    module = Noisy(ADAMW)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    strategy = EASGDStrategy(algorithm=algorithm, tau=4, groups=groups, compression="int8")
    fitting = trainer(4, strategy, max_epochs=3, enable_checkpointing=True, callbacks=[saving])
    saved = step and folder / f"step={step}.ckpt"
    fitting.fit(module, Resumable(rank, 8), ckpt_path=saved)
    return bits(weights(module)), strategy.telemetry.bytes_inside


def resumed_everywhere(rank: int, folder: Path) -> Any:
    rules = {"groups": ([[0, 3], [1, 2]], "easgd"), "warm-up": (None, PostLocalSGD(warm_up=14))}
    return {
        name: [resumed(rank, folder / name, *rule, step) for step in (None, 10, 20)]
        for name, rule in rules.items()
    }


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In the middle of a warm-up and after it, too."""
    for run in run_workers(resumed_everywhere, tmp_path, workers=4, timeout=120):
        for straight, *others in run.values():
            assert all(other[0] == straight[0] for other in others)
        assert run["groups"][0][1] > 0
        assert all(inside == 0 for _, inside in run["warm-up"])


def regrouped(rank: int, folder: Path) -> Any:
    """Warnings where groups are others, and where one member's file is missing; own weights."""
    found = []
    resumed(rank, folder, 2, "easgd", None)
    for groups in ([[0, 2], [1, 3]], 2, 4):
        if rank == 3 and groups == 2:
            (file,) = folder.glob("step=10.ckpt.workers/*-3.ckpt")
            file.unlink()
        with pytest.MonkeyPatch.context() as patch:
            warned: list[str] = []
            patch.setattr("warnings.warn", lambda m, *_, w=warned, **__: w.append(str(m)))
            module, own = Toy(ADAMW), []
            module.on_train_start = lambda m=module, own=own: own.append(bits(weights(m)))
            trainer(4, EASGDStrategy(tau=4, groups=groups), max_epochs=2).fit(
                module, Resumable(rank, 8), ckpt_path=folder / "step=10.ckpt"
            )
        found.append(([w for w in warned if "at the center" in w], own))
    return found


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_members_that_cannot_go_on_as_equals_start_at_the_center(tmp_path: Path) -> None:
    runs = run_workers(regrouped, tmp_path, workers=4, timeout=120)
    for case, equals in enumerate([[0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]):
        warned = [run[case][0] for run in runs]
        own = [run[case][1] for run in runs]
        assert len(warned[0]) == len(equals)
        assert all(own[rank] == own[equals[0]] for rank in equals)
    changed, missing = runs[0][0][0], runs[0][1][0]
    assert (
        'Worker 0 starts at the center, with fresh optimizers: "groups have changed"' in changed[0]
    )
    assert any("Worker 2 starts" in w and "worker 3 of its group does" in w for w in missing)
