"""Groups of workers: gradients averaged inside, exchanges between, against slow references.

Workers train all cases one after another, so that they are started once.
"""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from processes import Workers, run_workers
from test_exchange import WithNorm
from test_reference import LR, OPTIMIZERS, reference_optimizers
from torch.optim import lr_scheduler
from toy import Resumable, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, DiLoCo, EASGDStrategy, PostLocalSGD, SlowMo, TopK
from lightning_easgd.communication import Header, liveness
from lightning_easgd.groups import arrange

GROUPS = {4: 2, 8: [[7, 3], [0, 1, 5], [2, 4, 6]]}
"""As given, by the number of workers; the second in no order, and of different sizes."""


@dataclass
class Case:
    """How groups train, and the reference of the rule; None: the paper's EASGD."""

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
    overlap: bool | None = None

    def own(self, rank: int) -> int:
        less = self.missing[rank % len(self.missing)] if self.missing else 0
        return self.steps * self.accumulate - less


CASES = {
    "sgd": Case(optimizer="sgd"),
    "nesterov": Case(),
    "nesterov, blocking": Case({"overlap": False}),
    "adamw": Case(optimizer="adamw"),
    "accumulated gradients": Case(accumulate=3),
    "clipped": Case(clip=0.3),
    "tau=1": Case({"tau": 1}),
    "momentum of the center": Case({"algorithm": EASGD(0.6)}),
    "local_sgd": Case({"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd"),
    "downpour": Case({"algorithm": "downpour"}, reference.Downpour(), "sgd"),
    "slowmo": Case({"algorithm": SlowMo(0.9, 0.4)}, reference.SlowMo(0.9, 0.4), "adamw"),
    "diloco": Case({"algorithm": DiLoCo(0.7, 0.9)}, reference.DiLoCo(0.7, 0.9), "sgd"),
    "fewer batches in groups": Case(missing=(0, 5)),
    "fewer batches in groups, adamw": Case(missing=(6, 0), optimizer="adamw"),
    "fewer batches everywhere": Case(missing=(2, 0, 5, 3), steps=17),
    "fewer batches, local_sgd": Case(
        {"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd", missing=(0, 4)
    ),
    "a poisoned group": Case(optimizer="sgd", sick=(2, 8)),
    "a poisoned group, local_sgd": Case(
        {"algorithm": "local_sgd"}, reference.LocalSgd(), "sgd", sick=(2, 8)
    ),
}


def lists(workers: int) -> list[list[int]]:
    return arrange(GROUPS[workers], [0] * workers)


def train(rank: int, workers: int, case: Case) -> Any:
    """The center in the end, the worker's own last weights, and telemetry."""
    module, own = Toy(OPTIMIZERS[case.optimizer]), {}
    strategy = EASGDStrategy(**{"tau": 4, "groups": GROUPS[workers], **case.options})

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if case.sick is not None and (rank, batch_idx + 2) == case.sick:
            module.w.data[0, 0] = float("nan")

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
    return {name: train(rank, workers, case) for name, case in CASES.items()}


@cache
def trained(workers: int) -> list[dict[str, Any]]:
    return run_workers(train_all, workers, workers=workers, timeout=170)


def expected(case: Case, workers: int) -> reference.State:
    """The center, where each group is one worker with the batches of all of its members."""
    groups = lists(workers)
    data = reference.merged([batches(rank, case.own(rank)) for rank in range(workers)], groups)
    optimizers = reference_optimizers(case.optimizer, lambda name, t: LR, len(groups))
    if case.clip is not None:
        optimizers = [reference.Clipped(optimizer, case.clip) for optimizer in optimizers]
    sick = None
    if case.sick is not None:
        sick = next(i for i, ranks in enumerate(groups) if case.sick[0] in ranks), case.sick[1]
    start, tau = initial_weights(), case.options.get("tau", 4)
    own = {"tau": tau, "accumulate": case.accumulate, "sick": sick}
    if case.reference is not None:
        return reference.restarting(case.reference, start, data, optimizers, **own)
    center, _ = reference.easgd(
        start,
        data,
        optimizers,
        alpha=lambda name, t: 0.9 / len(groups),
        center_momentum=getattr(case.options.get("algorithm"), "center_momentum", 0.0),
        final_exchange=True,
        **own,
    )
    return center


@pytest.mark.parametrize("workers", GROUPS)
@pytest.mark.parametrize("name", CASES)
def test_a_group_is_one_worker_with_the_batches_of_its_members(name: str, workers: int) -> None:
    center = expected(CASES[name], workers)
    for got, *_ in [run[name] for run in trained(workers)]:
        for key, value in got.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


def bits(state: Any) -> Any:
    return {key: value.tobytes() for key, value in state.items()}


@pytest.mark.parametrize("workers", GROUPS)
@pytest.mark.parametrize("name", CASES)
def test_members_are_equal_bit_for_bit_and_groups_are_not(name: str, workers: int) -> None:
    own = [bits(run[name][1]) for run in trained(workers)]
    firsts = []
    for ranks in lists(workers):
        assert all(own[rank] == own[ranks[0]] for rank in ranks)
        firsts.append(own[ranks[0]])
    if "local_sgd" not in name:  # whose last exchange may follow the last step
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
        headers = 3 * 8 * len(Header.__dataclass_fields__)
        # Headers of 4 exchanges and one before the end. The sum of two groups: 8 numbers.
        between = 5 * headers + (4 * 64 if rank in (0, 2) else 0)
        assert telemetry.bytes_between == between
        # In 14 steps 8 numbers of averaged gradients, and 3 that say so. These also before each
        # exchange and at the end. 8 to pass every sum on.
        inside = 14 * (64 + 24) + 4 * 24 + 4 * 64
        assert telemetry.bytes_inside == inside
        assert telemetry.bytes_sent == inside + between
    assert [run["a poisoned group"][2].non_finite for run in runs] == [1] * 4


def compressed(rank: int) -> Any:
    """Members' weights and all centers, with codecs, fragments and statistics."""
    found = {}
    for codec in (None, "bf16", "int8", TopK(0.3)):
        for algorithm in ("easgd", "local_sgd"):
            module, own = WithNorm(partial(torch.optim.SGD, lr=0.1)), {}
            strategy = EASGDStrategy(
                algorithm=algorithm,
                tau=4,
                groups=2,
                compression=codec,
                fragments=2,
                bucket_bytes=40,
            )
            module.on_train_epoch_end = lambda m=module, own=own: own.update(weights(m))
            trainer(4, strategy).fit(module, loader(rank, 11, torch.float32))
            center = {key: value.numpy().copy() for key, value in module.state_dict().items()}
            found[str(codec), algorithm] = bits(own), center
    return found


def test_codecs_fragments_and_statistics_reach_all_members() -> None:
    runs = run_workers(compressed, workers=4, timeout=120)
    for case, (_, center) in runs[0].items():
        own = [run[case][0] for run in runs]
        assert own[0] == own[1]
        assert own[2] == own[3]
        assert all(bits(run[case][1]) == bits(center) for run in runs)


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


class Partial(Toy):
    """Each worker uses a parameter of its own besides the others, and nobody the last one."""

    def __init__(self, rank: int) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1))
        self.own = torch.nn.ParameterList(torch.ones(2, dtype=torch.float64) for _ in range(4))
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + (self.own[self.rank] ** 2).sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Gan(Toy):
    """A generator and a discriminator in turn; gradients accumulate in pairs, and are clipped."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1, momentum=0.5))
        self.automatic_optimization = False
        self.judge = torch.nn.Linear(2, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.judge.weight, 0.3)
        torch.nn.init.zeros_(self.judge.bias)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        fake, (generator, discriminator) = x @ self.w + self.b, self.optimizers()
        with generator.toggle_model():
            self.manual_backward(-self.judge(fake).mean() + ((fake - y) ** 2).mean())
            self.clip_gradients(generator, gradient_clip_val=0.5)
            generator.step()
            generator.zero_grad()
        with discriminator.toggle_model():
            self.manual_backward((self.judge(fake.detach()) - self.judge(y)).mean())
        if batch_idx % 2:
            torch.nn.utils.clip_grad_norm_(self.judge.parameters(), 0.2)
            discriminator.step()
            discriminator.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            self.make_optimizer([self.w, self.b]),
            torch.optim.Adam(self.judge.parameters(), lr=0.01),
        ]


class Half(Toy):
    """Worker 1's loss is too large for float16 gradients in batch 5."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1), dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(tuple(part.float() for part in batch), batch_idx)
        return loss * 1e38 if self.global_rank == 1 and batch_idx == 5 else loss


class Scheduled(Toy):
    """With a schedule per step, and a loss that is clipped by value."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Complex(Toy):
    """With a complex parameter."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        self.z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, _ = batch
        return super().training_step(batch, batch_idx) + (self.z * x.mean() - 1j).abs().sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


ADAMW = partial(torch.optim.AdamW, lr=0.05)
MAKERS: dict[str, Any] = {
    "unused parameters": Partial,
    "manual optimization": lambda rank: Gan(),
    "float16": lambda rank: Half(),
    "accumulated and clipped": lambda rank: Scheduled(ADAMW),
    "bfloat16": lambda rank: Toy(ADAMW, dtype=torch.bfloat16),
    "complex": lambda rank: Complex(),
}


def last_weights(rank: int, name: str, strategy: Any) -> Any:
    """The worker's weights after its last step, and the scale of its gradients."""
    module, own = MAKERS[name](rank), {}
    module.on_train_epoch_end = lambda: own.update(
        {n: p.detach().to(torch.complex128).clone().numpy() for n, p in module.named_parameters()}
    )
    options: dict[str, Any] = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    if name == "float16":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    if name == "accumulated and clipped":
        options |= {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float64
    trainer(3, strategy, **options).fit(module, loader(rank, 11, dtype))
    return own, scaler.get_scale()


def beside_ddp(rank: int) -> Any:
    return {
        name: [
            last_weights(rank, name, strategy)
            for strategy in (EASGDStrategy(groups=3, tau=4, alpha=0.0), FIND)
        ]
        for name in MAKERS
    }


FIND = "ddp_find_unused_parameters_true"


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_inside_a_group_training_is_that_of_ddp() -> None:
    """Unused parameters, manual optimization, clipping, precisions: a group without a pull."""
    for run in run_workers(beside_ddp, workers=3, timeout=120):
        for name, ((ours, scale), (theirs, their_scale)) in run.items():
            assert scale == their_scale
            tolerance = {"float16": 1e-3, "bfloat16": 0.05}.get(name, 1e-9)
            for key, value in ours.items():
                np.testing.assert_allclose(value, theirs[key], atol=tolerance, err_msg=name)


def scheduled(rank: int) -> Any:
    """Two epochs in which worker 1 has fewer batches than its mate; what both are then."""
    module = Scheduled(ADAMW)
    seen = []

    def on_train_epoch_start() -> None:
        state = fitting.optimizers[0].state_dict()
        moments = [s["exp_avg"].tolist() for s in state["state"].values()]
        seen.append((bits(weights(module)), moments, state["param_groups"][0]["lr"]))

    module.on_train_epoch_start = on_train_epoch_start
    fitting = trainer(2, EASGDStrategy(tau=4, groups=2), max_epochs=3)
    fitting.fit(module, loader(rank, [10, 7][rank]))
    return seen, bits(weights(module))


def test_who_had_fewer_batches_goes_on_with_all_that_its_group_became() -> None:
    one, two = run_workers(scheduled, workers=2)
    assert one == two
    assert one[0][1][2] == pytest.approx(0.05 * 0.9**10)


class Noisy(Toy):
    """Draws random numbers in every step, as dropout does."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)


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
            (file,) = folder.glob("step=10.ckpt.workers/*/3.ckpt")
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
    assert "Worker 0 starts at the center, with fresh optimizers: groups have changed" in changed[0]
    assert any("Worker 2 starts" in w and "worker 3 of its group does" in w for w in missing)


def warmed_up(rank: int) -> Any:
    module = Toy(ADAMW)
    strategy = EASGDStrategy(algorithm=PostLocalSGD(warm_up=20), tau=4)
    trainer(2, strategy).fit(module, loader(rank, [10, 7][rank]))
    return weights(module)


def test_a_warm_up_lasts_with_fewer_batches_too() -> None:
    """All workers are one, as long as any of them has batches."""
    (data,) = reference.merged([batches(0, 10), batches(1, 7)], [[0, 1]])
    (optimizer,) = reference_optimizers("adamw", lambda name, t: 0.05, 1)
    x = initial_weights()
    for t, batch in enumerate(data):
        x = optimizer.step(x, reference.toy_gradient(x, batch), t)
    for got in run_workers(warmed_up, workers=2):
        for key, value in got.items():
            np.testing.assert_allclose(value, x[key], rtol=1e-9, atol=1e-11)


def killed(rank: int) -> None:
    module = Toy(partial(torch.optim.SGD, lr=0.1))

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 3 and batch_idx == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    module.on_train_batch_start = on_train_batch_start
    trainer(4, EASGDStrategy(tau=4, groups=2, exchange_timeout=5)).fit(module, loader(rank, 24))


def test_a_member_that_is_killed_is_named_to_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_PERIOD_SECONDS", 0.3)
    monkeypatch.setattr(liveness, "_PATIENCE_SECONDS", 1.5)
    with Workers(killed, workers=4) as group:
        ended = group.collect(60, without=3)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "Worker 3 gave no sign of life" in outcome.message


def apart(rank: int) -> None:
    """Worker 1 leaves a step out that its mate takes."""
    module = Gan()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        if (rank, batch_idx) != (1, 3):
            step(batch, batch_idx)

    module.training_step = training_step
    trainer(2, EASGDStrategy(tau=6, groups=2, exchange_timeout=5)).fit(module, loader(rank, 7))


def test_members_that_do_different_things_are_told() -> None:
    outcomes = run_workers(apart, workers=2, check=False)
    assert all(outcome.error == "ExchangeError" for outcome in outcomes)
    assert any("whose gradients are averaged do different" in o.message for o in outcomes)


def refused(rank: int) -> None:
    module = Toy(partial(torch.optim.LBFGS, lr=0.1))
    with pytest.raises(MisconfigurationException, match="LBFGS decides by the loss"):
        trainer(2, EASGDStrategy(groups=2)).fit(module, loader(rank, 2))
    with pytest.raises(ValueError, match="groups=3 does not divide the 2 workers"):
        trainer(2, EASGDStrategy(groups=3)).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match=r"does not hold every rank from 0 to 1 once.*'node'"):
        trainer(2, EASGDStrategy(groups=[[0], [2]])).fit(Toy(ADAMW), loader(rank, 2))
    with pytest.raises(ValueError, match="sparse gradient cannot be averaged"):
        trainer(2, EASGDStrategy(groups="node")).fit(Sparse(ADAMW), loader(rank, 2))


class Sparse(Toy):
    """Looks a row up in a table."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.table(torch.tensor([1])).sum()


def test_what_cannot_be_a_group_is_refused_on_all_workers() -> None:
    run_workers(refused, workers=2)


@pytest.mark.parametrize(
    "groups", [0, -2, 1.5, True, "host", [], [[]], [[0, 1], [1]], [0, 1], [["0"]], [[-1, 0]], {}]
)
def test_what_names_no_groups_is_refused(groups: Any) -> None:
    with pytest.raises(ValueError, match=r"groups=.* does not name groups .*lists of ranks"):
        EASGDStrategy(groups=groups)


def test_groups_and_a_warm_up_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"groups=2 is not possible with PostLocalSGD.*Remove"):
        EASGDStrategy(algorithm="post_local_sgd", groups=2)


@pytest.mark.parametrize(
    ("groups", "arranged"),
    [
        (None, []),
        (2, [[0, 1], [2, 3]]),
        (4, [[0, 1, 2, 3]]),
        ("node", [[0, 2], [1, 3]]),
        ([[3, 1], [2, 0]], [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_numbered_by_their_lowest_rank(groups: Any, arranged: Any) -> None:
    assert arrange(groups, [7, 5, 7, 5]) == arranged
