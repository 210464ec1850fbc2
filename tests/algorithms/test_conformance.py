"""One table that every rule runs through, against slow, obvious references.

Workers are processes that train with Lightning, and threads that exchange by memory, without it.
Processes train all cases of all rules one after another, so that they are started once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import reference
import torch
from in_memory import Wire, Worker, make_worker, run_threads
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_workers
from toy import Batches, Resumable, Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import (
    EASGD,
    SMA,
    CenterAverage,
    DelayedSGD,
    DiLoCo,
    Downpour,
    EASGDStrategy,
    LeaderSGD,
    MDownpour,
    Often,
    PostLocalSGD,
    Rule,
    SlowMo,
)
from lightning_easgd.algorithms import choose_rule
from lightning_easgd.center.center import Center
from lightning_easgd.communication import Phase

LR = 0.05
SGD = partial(torch.optim.SGD, lr=LR)
ADAMW = partial(torch.optim.AdamW, lr=LR)
TURNS = {
    1: [{"w": [0, 1, 2], "b": [0, 1]}],
    2: [{"w": [0, 1], "b": []}, {"w": [2], "b": [0, 1]}],
}
"""Rows of the toy's parameters in each fragment, by the number of fragments."""


@dataclass
class Row:
    """A rule and its reference; None: the paper's EASGD, whose workers are pulled."""

    rule: str | Rule
    reference: Any = None
    copies: int = 0
    """Flat copies of the parameters that it keeps, besides the center and the sum in flight."""
    options: dict[str, Any] = field(default_factory=dict)
    tau: int | None = None
    """The only period that it can."""
    fragments: int = 2
    """The most that it can."""
    run: Any = None
    """What trains with the reference; None: reference.restarting."""
    average: Any = None
    """Makes the reference of the center's running average, which is then what is compared."""

    def can(self, case: Case, workers: int) -> bool:
        """Whether it can be trained so."""
        cut = case.fragments <= self.fragments
        in_time = self.delay * case.fragments <= self.period(case)
        in_step = self.period(case) % (case.fragments * self.pause) == 0
        watches = case.rates is None or getattr(self.rule, "lr_drop", None) is not None
        return cut and in_time and in_step and watches and workers > case.needs_others

    @property
    def by_itself(self) -> bool:
        """Whether its workers train without averaging gradients, which threads cannot."""
        return not getattr(self.rule, "warm_up", 0)

    @property
    def pause(self) -> int:
        """The period of small parameters; 1 if they have none of their own."""
        return self.options["often"].tau if "often" in self.options else 1

    @property
    def delay(self) -> int:
        """Steps that workers take while the sum travels, if they restart."""
        return getattr(self.rule, "delay", 0)

    def period(self, case: Case) -> int:
        return self.tau or case.tau


def users_own() -> Rule:
    """One that a page shows."""
    rule: Rule = pages.example("Lookahead")()
    return rule


OFTEN = {"often": Often(tau=2, below=6)}
"""The two biases of the toy; its weight has six elements."""
ROWS = {
    "easgd": Row("easgd"),
    "easgd alpha=0": Row("easgd", options={"alpha": 0.0}),
    "easgd with momentum": Row(EASGD(center_momentum=0.6), copies=1),
    "easgd with a pull": Row(EASGD(pull=0.3)),
    "easgd, looking ahead": Row(EASGD(pull=0.4, look_ahead=1.0), copies=1),
    "easgd, often": Row("easgd", options=OFTEN),
    "easgd, looking ahead, often": Row(EASGD(pull=0.4, look_ahead=1.0), copies=1, options=OFTEN),
    "sma": Row(SMA(0.6, lr_drop=0.5), copies=1),
    "local_sgd": Row("local_sgd", reference.LocalSgd()),
    "post_local_sgd": Row(PostLocalSGD(warm_up=6), reference.PostLocalSgd(6)),
    "downpour": Row("downpour", reference.Downpour()),
    "downpour, average": Row(Downpour(average=True), reference.LocalSgd()),
    "mdownpour": Row(MDownpour(0.5), reference.MDownpour(0.5), copies=1, tau=1, fragments=1),
    "slowmo": Row(SlowMo(0.9, 0.4), reference.SlowMo(0.9, 0.4), copies=1),
    "bmuf": Row("bmuf", reference.Bmuf(1.0, 0.875), copies=1),
    "diloco": Row("diloco", reference.DiLoCo(0.7, 0.9), copies=1),
    "diloco by Adam": Row(
        DiLoCo(0.05, optimizer=torch.optim.Adam), reference.OuterAdam(0.05), copies=2
    ),
    "diloco, 1 step late": Row(DiLoCo(delay=1), reference.DiLoCo(0.7, 0.9, 1, 0.5), copies=1),
    "diloco, 2 steps late": Row(
        DiLoCo(delay=2, mixing_rate=0.0), reference.DiLoCo(0.7, 0.9, 2, 0.0), copies=1
    ),
    "leader_sgd": Row(
        LeaderSGD(0.3, loss_smoothing=0.8),
        reference.LeaderSgd(0.3, 0.8),
        fragments=1,
        run=reference.following,
    ),
    "delayed_sgd": Row("delayed_sgd", reference.DelayedSgd(0.5), copies=1, run=reference.delayed),
    "delayed_sgd, all of its own": Row(
        DelayedSGD(1), reference.DelayedSgd(1.0), copies=1, run=reference.delayed
    ),
    "delayed_sgd, ema": Row(
        DelayedSGD(0.3),
        reference.DelayedSgd(0.3),
        copies=2,
        options={"center_average": CenterAverage("ema", 0.3)},
        run=reference.delayed,
        average=partial(reference.Average, a=0.3),
    ),
    "a user's": Row(users_own(), reference.Lookahead(0.5)),
    "sma, polyak": Row(
        SMA(0.6, lr_drop=0.5),
        copies=2,
        options={"center_average": "polyak"},
        average=reference.Average,
    ),
    "diloco, 1 step late, ema": Row(
        DiLoCo(delay=1),
        reference.DiLoCo(0.7, 0.9, 1, 0.5),
        copies=2,
        options={"center_average": CenterAverage("ema", 0.3)},
        average=partial(reference.Average, a=0.3),
    ),
    "adownpour": Row(
        "downpour",
        reference.Downpour(),
        copies=1,
        options={"center_average": "polyak"},
        average=reference.Average,
    ),
    "mvadownpour": Row(
        "downpour",
        reference.Downpour(),
        copies=1,
        options={"center_average": "ema"},
        average=partial(reference.Average, a=0.001),
    ),
}
OVERLAPS = [name for name, row in ROWS.items() if choose_rule(row.rule).overlaps]


@dataclass
class Case:
    """How a rule is used, and how close it is to its reference."""

    steps: int
    tau: int = 4
    make: Any = ADAMW
    accumulate: int = 1
    missing: int = 0
    """Batches that the last worker has less than the others."""
    sick: tuple[int, int] | None = None
    """A worker whose weights are poisoned, and the step of the exchange that finds it."""
    fragments: int = 1
    dtype: torch.dtype = torch.float64
    within: float = 1e-9
    rates: list[dict[int, float]] | None = None
    """Learning rates of each worker from a step on, in ascending order; None: the optimizer's."""

    @property
    def needs_others(self) -> bool:
        return bool(self.missing or self.sick)

    def own(self, rank: int, workers: int) -> int:
        """Batches of a worker."""
        return self.steps * self.accumulate - (self.missing if rank == workers - 1 else 0)

    def rate(self, rank: int, step: int) -> float:
        """The learning rate of a worker's step."""
        if self.rates is None:
            return self.make.keywords["lr"]
        return [rate for since, rate in self.rates[rank].items() if since <= step][-1]


FALLS = [{0: 0.05, 9: 0.04, 21: 0.02}, {0: 0.05, 5: 0.02, 29: 0.01}]
"""Worker 1's falls to less than half before steps 5 and 29, worker 0's in two parts before 21.

With τ = 4 that is seen at steps 8, 24 and 32; SMA restarts at 12, 28 and 36.
"""


STILL = Case(steps=9, tau=2, make=partial(torch.optim.SGD, lr=0.0))
CASES = {
    "20 exchanges": Case(steps=20, tau=1),
    "6 exchanges": Case(steps=22),
    "single precision": Case(steps=20, dtype=torch.float32, within=1e-4),
    "half precision": Case(steps=20, make=SGD, dtype=torch.bfloat16, within=0.1),
    "nothing to learn, float32": replace(STILL, dtype=torch.float32, within=1e-6),
    "nothing to learn, bfloat16": replace(STILL, dtype=torch.bfloat16, within=0.02),
    "accumulated gradients": Case(steps=10, accumulate=3),
    "fewer batches": Case(steps=24, missing=6, make=SGD),
    "two fragments": Case(steps=21, fragments=2),
    "two fragments to the end": Case(steps=20, fragments=2),
    "a poisoned worker": Case(steps=16, make=SGD, sick=(1, 8)),
    "learning rates fall": Case(steps=46, rates=FALLS),
    "learning rates fall, fewer batches": Case(steps=46, missing=13, make=SGD, rates=FALLS),
    "learning rates fall, two fragments": Case(steps=46, fragments=2, rates=FALLS),
}
ALONE = {"6 exchanges", "two fragments", "learning rates fall"}
"""What one worker trains with every rule; it trains the others with every third."""


def is_trained(name: str, case: str, workers: int) -> bool:
    """Whether so many processes train it; two: half of what threads train, too."""
    row, number = ROWS[name], [*ROWS].index(name) + [*CASES].index(case)
    if workers == 1:
        return row.can(CASES[case], 1) and (case in ALONE or number % 3 == 0)
    return row.can(CASES[case], 2) and (number % 2 == 0 or not row.by_itself)


def train(rank: int, workers: int, row: Row, case: Case, **more: Any) -> dict[str, np.ndarray]:
    """The center in the end, of the precision that it began with."""
    module = Toy(case.make, dtype=case.dtype)
    strategy = strategy_of(row, case, **more)

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        poison(module, rank, batch_idx, case)

    def on_train_end() -> None:
        require_copies(strategy._fit.center, module, row)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        strategy.optimizers[0].param_groups[0]["lr"] = case.rate(rank, module.global_step)

    module.on_train_batch_end, module.on_train_end = on_train_batch_end, on_train_end
    module.on_train_batch_start = on_train_batch_start
    fitting = trainer(workers, strategy, accumulate_grad_batches=case.accumulate)
    fitting.fit(module, loader(rank, case.own(rank, workers), case.dtype))
    assert all(parameter.dtype == case.dtype for parameter in module.parameters())
    return weights(module)


def strategy_of(row: Row, case: Case, **more: Any) -> EASGDStrategy:
    options = {"algorithm": row.rule, "tau": row.period(case), "fragments": case.fragments}
    return EASGDStrategy(**options, **row.options, **more)


def poison(module: Toy, rank: int, batch: int, case: Case) -> None:
    """A batch is over, behind which the weights of the case's sick worker are not finite."""
    if case.sick is not None and (rank, batch + 2) == case.sick:
        module.w.data[0, 0] = float("nan")


def require_copies(center: Center, module: Toy, row: Row) -> None:
    """The rule keeps as many copies of the parameters as it says."""
    fragments = [f for s in center.cohorts for f in s.fragments]
    kept = [v for f in fragments for part in f.rule_state for v in part.values()]
    kept += [part for f in fragments if row.average for part in f.delivered.parts]
    kept += [part for f in fragments if f.start for part in f.start.parts]
    sizes = [tensor.numel() for tensor in kept if tensor.dim()]
    assert sum(sizes) == row.copies * sum(p.numel() for p in module.parameters())


def train_in_memory(
    wire: Wire, rank: int, row: Row, case: Case, more: dict[str, Any]
) -> dict[str, np.ndarray]:
    """As :func:`train`, by a thread, and with the few calls that Lightning's loops come down to."""
    module = Toy(case.make, dtype=case.dtype)
    strategy = strategy_of(row, case, **more)
    worker = make_worker(wire, rank, module, strategy, steps=case.steps)
    train_epoch(worker, case)
    assert worker.exchange.meet(Phase.EPOCH_END)
    assert worker.exchange.finish(exchange=True)
    require_copies(worker.center, module, row)
    return weights(module)


def train_epoch(worker: Worker, case: Case) -> None:
    """Gradients of the last batch of a step belong to the step, as in Lightning's closure."""
    module, optimizer, exchange = worker.module, worker.optimizer, worker.exchange
    count = case.own(worker.rank, worker.workers)
    for number, batch in enumerate(Batches(worker.rank, count, case.dtype)):
        step, place = divmod(number, case.accumulate)
        optimizer.param_groups[0]["lr"] = case.rate(worker.rank, step)

        def closure(batch: Any = batch, number: int = number, first: bool = place == 0) -> Any:
            exchange.before_batch()
            loss = module.training_step(batch, number)
            exchange.after_training_step(loss)
            if first:
                optimizer.zero_grad()
            (loss / case.accumulate).backward()
            return loss

        if place < case.accumulate - 1:
            closure()
        else:
            worker.step(closure)
        poison(module, worker.rank, number, case)


def train_all(rank: int, workers: int) -> dict[tuple[str, str], Any]:
    """All cases that workers can be compared in; by rule and case."""
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    return {
        (name, case): train(rank, workers, row, CASES[case])
        for name, row in ROWS.items()
        for case in CASES
        if is_trained(name, case, workers)
    }


@cache
def trained(workers: int) -> list[dict[tuple[str, str], Any]]:
    return run_workers(train_all, workers, workers=workers, timeout=170)


@cache
def trained_in_memory(name: str, case: str) -> list[dict[str, np.ndarray]]:
    return run_threads(train_in_memory, ROWS[name], CASES[case], {}, workers=2)


def expected(row: Row, case: Case, workers: int) -> dict[str, np.ndarray]:
    """The center by the reference."""
    start = initial_weights()
    make = {
        torch.optim.SGD: reference.Sgd,
        torch.optim.AdamW: partial(reference.AdamW, start=start),
    }
    counts = [case.own(rank, workers) for rank in range(workers)]
    optimizers = [
        make[case.make.func](lambda name, t, rank=rank, n=n: case.rate(rank, min(t, n - 1)))
        for rank, n in enumerate(counts)
    ]
    data = [batches(rank, count) for rank, count in enumerate(counts)]
    average = row.average and row.average(start)
    own = {"tau": row.period(case), "accumulate": case.accumulate, "average": average}
    if row.reference is not None:
        own |= {"turns": TURNS[case.fragments], "sick": case.sick}
        center = (row.run or reference.restarting)(row.reference, start, data, optimizers, **own)
        return average.z if average else center
    own["tau"] = row.pause if row.pause > 1 else own["tau"] // case.fragments
    momentum = getattr(row.rule, "center_momentum", 0.0)
    alpha = partial(strength, case, row.options.get("alpha", 0.9 / workers), row.pause)
    center, _ = reference.easgd(
        start,
        data,
        optimizers,
        **own,
        alpha=alpha,
        center_momentum=momentum,
        lr_drop=getattr(row.rule, "lr_drop", None) or 0.0,
        pull=getattr(row.rule, "pull", None),
        look_ahead=getattr(row.rule, "look_ahead", 0.0),
        sick=case.sick,
        final_exchange=True,
    )
    return average.z if average else center


def strength(case: Case, alpha: float, pause: int, name: str, t: int) -> np.ndarray:
    """α of each row: 0 while another fragment has its turn, or only small parameters have."""
    turns, between = TURNS[case.fragments], case.tau // case.fragments
    rates = np.zeros({"w": (3, 1), "b": (2,)}[name])
    rows = turns[(t // between - 1) % len(turns)][name] if t % between == 0 else []
    is_often = pause > 1 and name == "b"
    rates[slice(None) if is_often or t == case.steps else rows] = alpha if t else 0.0
    return rates


@pytest.mark.parametrize(
    ("name", "case", "workers"),
    [(n, c, p) for n in ROWS for c in CASES for p in (1, 2) if is_trained(n, c, p)],
)
def test_the_center_is_that_of_the_reference(name: str, case: str, workers: int) -> None:
    require_reference(name, case, workers, [run[name, case] for run in trained(workers)])


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize(
    ("name", "case"),
    [(n, c) for n, row in ROWS.items() for c in CASES if row.can(CASES[c], 2) and row.by_itself],
)
def test_the_center_is_that_of_the_reference_in_memory(name: str, case: str) -> None:
    require_reference(name, case, 2, trained_in_memory(name, case))


def require_reference(name: str, case: str, workers: int, runs: list[Any]) -> None:
    """All workers hold the same center, which is that of the reference."""
    center = expected(ROWS[name], CASES[case], workers)
    first, *others = runs
    for key, value in first.items():
        assert all(np.array_equal(value, other[key]) for other in others)
        np.testing.assert_allclose(value, center[key], rtol=0, atol=CASES[case].within)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in OVERLAPS
        for case in ("6 exchanges", "learning rates fall", "two fragments", "fewer batches")
        if ROWS[name].can(CASES[case], 2)
    ],
)
def test_overlap_changes_no_bit_in_memory(name: str, case: str) -> None:
    behind = trained_in_memory(name, case)  # as by default
    blocking = run_threads(train_in_memory, ROWS[name], CASES[case], {"overlap": False}, workers=2)
    assert [bits(center) for center in behind] == [bits(center) for center in blocking]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_moves_where_workers_agree_and_have_nothing_to_learn(name: str, dtype: str) -> None:
    case = f"nothing to learn, {dtype}"
    if is_trained(name, case, 2):
        runs = [run[name, case] for run in trained(2)]
    else:
        runs = trained_in_memory(name, case)
    for run in runs:
        for key, value in run.items():
            start = torch.tensor(initial_weights()[key], dtype=getattr(torch, dtype))
            assert np.array_equal(value, start.double().numpy())


def train_blocking(rank: int) -> dict[tuple[str, str], Any]:
    return {
        (name, case): train(rank, 2, ROWS[name], CASES[case], overlap=False)
        for name in OVERLAPS
        for case in ("6 exchanges", "learning rates fall", "two fragments")
        if is_trained(name, case, 2)
    }


def test_overlap_changes_no_bit_where_it_is_possible() -> None:
    for behind, blocking in zip(trained(2), run_workers(train_blocking, workers=2), strict=True):
        for key, center in blocking.items():
            assert bits(center) == bits(behind[key])


def resume_all(rank: int, folder: Path) -> Any:
    """Per rule and number of fragments, the final bits of a run and of what resumed it.

    Those of what is delivered, and of the center.
    """
    return {
        (name, fragments): [
            resumable(rank, row, fragments, folder / name.replace("/", ""), step)
            for step in (None, 10, 20)[: 4 - fragments]
        ]
        for name, row in ROWS.items()
        for fragments in range(1, row.fragments + 1)
    }


def resumable(rank: int, row: Row, fragments: int, folder: Path, step: int | None) -> Any:
    module = Toy(ADAMW)
    saving = ModelCheckpoint(
        folder / str(fragments), "{step}", every_n_train_steps=10, save_top_k=-1
    )
    options = {"algorithm": row.rule, "tau": row.tau or 4, "fragments": fragments, **row.options}
    strategy = EASGDStrategy(**options)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        rate = Case(steps=32, rates=FALLS).rate(rank, module.global_step)
        strategy.optimizers[0].param_groups[0]["lr"] = rate

    module.on_train_batch_start = on_train_batch_start
    epochs = 4 if getattr(row.rule, "lr_drop", None) else 3  # of 8 steps; the rates fall at 29, too
    more = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(2, strategy, **more)
    saved = step and folder / str(fragments) / f"step={step}.ckpt"
    fitting.fit(module, Resumable(rank, 8), ckpt_path=saved)
    center = strategy.center_state_dict()
    return [(v.tobytes(), center[n].numpy().tobytes()) for n, v in weights(module).items()]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Between two exchanges, and at one; with two fragments, at one."""
    for run in run_workers(resume_all, tmp_path, workers=2, timeout=170):
        for key, (straight, *others) in run.items():
            assert others == [straight] * len(others), key
