"""Parameters with a second, shorter period: against the NumPy reference, and bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trajectories
from against_reference import OPTIMIZERS, compare
from in_memory import Wire, make_worker, run_threads
from interrupted import signs_of_life_come_often
from processes import Workers
from staying import run_workers
from torch import Tensor, nn
from toy import Toy, loader, trainer
from trajectories import Case, Given, Steps

from lightning_easgd import EASGD, Auto, EASGDStrategy, Linear, Often
from lightning_easgd.center.center import Center
from lightning_easgd.communication import Phase
from lightning_easgd.exchange.clock import Clock
from lightning_easgd.schedules import Durations, Observation, Period
from lightning_easgd.schedules.automatic import AutomaticPeriod
from lightning_easgd.telemetry import Telemetry

SMALL = Often(tau=2, below=6)
"""The two biases of the toy; its weight has six elements."""
GIVEN: dict[str, Any] = {"beta": 0.5, "tau": 6, "often": Often(tau=2, below=2)}
STEPS = 21

nan_is_told = pytest.mark.filterwarnings("ignore:At step .* the weights of worker")


@pytest.mark.parametrize(
    ("name", "workers", "final_exchange"),
    [
        # All pairs of values.
        (name, workers, (n + workers // 2) % 2 == 0)
        for n, name in enumerate(OPTIMIZERS)
        for workers in (2, 4)
    ],
)
def test_center_and_workers_follow_the_reference(
    name: str, workers: int, final_exchange: bool
) -> None:
    steps, tau = 42, 8  # twenty exchanges of the bias, and more than one before the end

    def alpha(parameter: str, t: int) -> float:
        due = parameter == "b" or t % tau == 0 or t == steps
        return 0.9 / workers if due else 0.0

    compare(
        name,
        workers,
        SMALL.tau,
        setup={"batches": steps},
        options={"tau": tau, "often": SMALL, "final_exchange": final_exchange},
        alpha=alpha,
    )


def train(
    wire: Wire,
    rank: int,
    options: dict[str, Any],
    disturb: Callable[[int, int, Any], None] = lambda *_: None,
    missing: int = 0,
    make: Callable[[int], Given] = lambda rank: Given(rank, 0.5),
) -> Any:
    """Weights after each step, and of the center at the end; what was counted."""
    module, strategy = make(rank), EASGDStrategy(**options)
    worker = make_worker(wire, rank, module, strategy, steps=STEPS)
    for number in range(STEPS - (missing if rank == 1 else 0)):

        def closure(number: int = number) -> Tensor:
            loss = module.training_step(torch.tensor(number), number)
            worker.exchange.after_training_step(loss)
            worker.optimizer.zero_grad()
            loss.backward()
            return loss

        worker.exchange.before_batch()
        worker.step(closure)
        disturb(rank, number, worker)
        module.on_train_batch_end()
    worker.exchange.meet(Phase.EPOCH_END)
    worker.exchange.finish(exchange=True)
    return [*module.seen, module.values()], strategy.telemetry


RULES: dict[str, dict[str, Any]] = {
    "easgd": {},
    "with momentum": {"algorithm": EASGD(0.5)},
    "looking ahead": {"algorithm": EASGD(pull=0.5, look_ahead=1)},
    "delayed_sgd": {"algorithm": "delayed_sgd", "beta": None},
}


@pytest.mark.parametrize("missing", [0, 8])
@pytest.mark.parametrize("name", RULES)
def test_each_portion_moves_as_with_a_period_of_its_own_alone(name: str, missing: int) -> None:
    """The gradients do not depend on the weights, so nothing else ties the two."""
    options = GIVEN | RULES[name]
    both = run_threads(train, options, lambda *_: None, missing, workers=2)
    for tau, part in ((6, slice(0, 2)), (2, slice(2, 3))):
        alone = options | {"tau": tau, "often": None}
        found = run_threads(train, alone, lambda *_: None, missing, workers=2)
        for (mine, _), (other, _) in zip(both, found, strict=True):
            assert [each[part] for each in mine] == [each[part] for each in other]


def poison(who: int, at: int, names: str) -> Callable[[int, int, Any], None]:
    def disturb(rank: int, number: int, worker: Any) -> None:
        if rank == who and number == at:
            for name in names:
                getattr(worker.module, name).data[0] = torch.nan

    return disturb


POISONED = [(1, 4), (1, 5), (0, 6), (0, 7), (0, 10), (0, 11)]
"""A worker, and the step in which its weights become NaN."""


@nan_is_told
@pytest.mark.parametrize(
    ("rule", "missing", "names", "who", "at"),
    [
        # All pairs of values; all combinations would be 96.
        (rule, (0, 14)[(r + n) % 2], ("wb", "b")[(r // 2 + n) % 2], who, at)
        for r, rule in enumerate(RULES)
        for n, (who, at) in enumerate(POISONED)
    ],
)
def test_overlap_changes_no_bit_where_a_worker_starts_again(
    rule: str, missing: int, names: str, who: int, at: int
) -> None:
    """Whether the main link finds it, at steps 6 and 12, or the other one in between."""
    poisoned = poison(who, at, names)
    behind, awaited = (
        run_threads(train, GIVEN | RULES[rule] | {"overlap": overlap}, poisoned, missing, workers=2)
        for overlap in (True, False)
    )
    for (mine, counted), (other, _) in zip(behind, awaited, strict=True):
        assert np.isfinite(mine[-1]).all()
        np.testing.assert_array_equal(mine, other)
        assert counted.non_finite == 1
    assert behind[0][0][-1] == behind[1][0][-1]


@pytest.mark.parametrize("rule", RULES)
def test_a_worker_that_waits_for_one_sum_sooner_changes_no_bit(rule: str) -> None:
    def drains(rank: int, number: int, worker: Any) -> None:
        if rank == 0 and number % 3 == 0:
            worker.exchange.drain()

    expected = run_threads(train, GIVEN | RULES[rule], workers=3)
    found = run_threads(train, GIVEN | RULES[rule], drains, workers=3)
    assert [each for each, _ in found] == [each for each, _ in expected]


@pytest.mark.parametrize("latest", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_worker_has_its_own_back_after_the_center(rule: str, latest: bool) -> None:
    """Of both portions, whether the sums in flight are awaited or not."""

    def looks(rank: int, number: int, worker: Any) -> None:
        before = worker.module.values()
        with worker.exchange.swapped("center", latest=latest):
            values = [value for _, view in worker.center.slices("center") for value in view]
            assert worker.module.values() == [float(value) for value in values]
            assert number < 2 or worker.module.values() != before
        assert worker.module.values() == before

    expected = run_threads(train, GIVEN | RULES[rule], workers=2)
    found = run_threads(train, GIVEN | RULES[rule], looks, workers=2)
    assert [each for each, _ in found] == [each for each, _ in expected]


class Late(Given):
    """A third parameter, which is frozen until step 7 and small or large."""

    def __init__(self, rank: int, elements: int) -> None:
        super().__init__(rank, 0.5)
        self.late = nn.Parameter(torch.ones(elements, dtype=torch.float64), requires_grad=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.late.requires_grad_(batch_idx >= 7)
        return super().training_step(batch, batch_idx) + (1 + self.rank) * self.late.sum()

    def values(self) -> list[float]:
        return [*super().values(), *self.late.tolist()]


@pytest.mark.parametrize("elements", [1, 2])
def test_what_is_unfrozen_joins_its_portion_whoever_waits_sooner(elements: int) -> None:
    joined: list[tuple[int, list[int]]] = []

    def note(rank: int, number: int, worker: Any) -> None:
        if rank == 1:
            joined.append((number, [portion.joined for portion in worker.center.portions]))

    def drains(rank: int, number: int, worker: Any) -> None:
        if rank == 0:
            worker.exchange.drain()

    make = partial(Late, elements=elements)
    expected = run_threads(train, GIVEN, note, 0, make, workers=2)
    found = run_threads(train, GIVEN, drains, 0, make, workers=2)
    assert [each for each, _ in found] == [each for each, _ in expected]
    assert found[0][0][-1] == found[1][0][-1]
    # Announced at steps 8 and 12, joined when those sums are taken in, two and six steps later.
    assert next(step for step, counts in joined if counts[1] == 2) == 10
    assert next(step for step, counts in joined if counts[0] == 2) == 18


class Two(nn.Module):
    """Two large parameters and two small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(8))
        self.bias, self.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))


def names(center: Center) -> list[list[str]]:
    portions = [[f.slices for f in p.those_of(p.joined)] for p in center.portions]
    return [[slice_.name for slices in portion for slice_ in slices] for portion in portions]


def center(often: Often, module: nn.Module | None = None) -> Center:
    return Center(module or Two(), buffers="average", rank=0, often=often)


def test_parameters_are_small_or_named() -> None:
    assert names(center(Often(below=8))) == [["weight", "norm"], ["bias", "scale"]]
    assert names(center(Often(below=2, names=("no*",)))) == [["weight", "bias"], ["norm", "scale"]]
    assert names(center(Often(below=0, names=("bias",)))) == [
        ["weight", "norm", "scale"],
        ["bias"],
    ]


@pytest.mark.parametrize(
    ("often", "said"),
    [
        (Often(below=1), "takes in none of the parameters that Two trains, which have 1 to 8"),
        (Often(below=9), "takes in all of the parameters that Two trains, which have 1 to 8"),
        (Often(below=9), "Let `below` lie in between, for example below=8, or leave often out"),
        (Often(names=("nrom",)), "names no parameter of Two: 'nrom' matches none of 'weight'"),
    ],
)
def test_both_portions_have_parameters(often: Often, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        center(often)


def test_a_cohort_may_have_small_parameters_alone() -> None:
    module = Two()
    module.bias.requires_grad_(False)
    found = center(Often(below=8), module)
    assert names(found) == [["weight", "norm"], ["scale"]]
    module.bias.requires_grad_(True)
    assert found.adopt_unfrozen()
    before = [portion.fingerprint(1) for portion in found.portions]
    after = [portion.fingerprint(2) for portion in found.portions]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
    found.often.join(2)
    assert names(found) == [["weight", "norm"], ["scale", "bias"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 0}, "Often.tau=0 is not allowed"),
        ({"below": -1}, "Often.below=-1 is not allowed"),
        ({"below": 0.5}, "Often.below=0.5 is not allowed"),
        ({"names": 3}, "Often.names=3 is not allowed"),
        ({"names": ["a", ""]}, r"Often.names=\('a', ''\) is not allowed"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Often(**options)


def test_what_is_no_often_is_refused() -> None:
    with pytest.raises(ValueError, match=r"often=2 is not allowed. Allowed: Often"):
        EASGDStrategy(often=2)  # type: ignore[arg-type]


def test_the_order_of_names_is_that_of_no_process() -> None:
    assert Often(names={"b*", "a*"}) == Often(names=("b*", "a*"))  # type: ignore[arg-type]


def test_it_is_said_with_which_groups_it_is_not_possible() -> None:
    with pytest.raises(ValueError, match=r"often=Often\(.*\) is not possible with groups='node': "):
        EASGDStrategy(often=SMALL, groups="node")


def test_nothing_is_exchanged_often_below_zero_elements() -> None:
    assert EASGDStrategy(often=Often(below=0), algorithm="local_sgd").options.often is None


def test_the_main_pause_is_a_multiple() -> None:
    with pytest.raises(ValueError, match=r"fragments=3 times often.tau=2: .* example tau=12; or"):
        EASGDStrategy(tau=8, fragments=3, often=SMALL)
    with pytest.raises(ValueError, match=r"multiple of often.tau=3: .*18; .* smaller often.tau\."):
        EASGDStrategy(tau=16, often=Often(tau=3))
    with pytest.raises(ValueError, match=r"never reaches fragments=3 times often.tau=2: "):
        Period(Linear(1, 5), 3, often=2)
    with pytest.raises(ValueError, match=r"multiple of fragments=5 times often.tau=2. Raise max"):
        EASGDStrategy(tau=Auto(max=9), fragments=5, often=SMALL)


@pytest.mark.parametrize("fragments", [1, 3])
def test_schedules_are_rounded_to_a_multiple(fragments: int) -> None:
    period = Period(Linear(1, 61, steps=60), fragments, often=4)
    step = 0
    while step < 200:
        tau, due = period.after(step)
        assert tau % (4 * fragments) == 0
        assert abs(tau - max(period.schedule.at(step), 4 * fragments)) <= 2 * fragments
        assert due % 4 == 0 < due - step == tau // fragments
        step = due


def resumed(rank: int, folder: Path) -> Any:
    """Weights after each step, uninterrupted and resumed."""
    schedule = GIVEN | {"tau": Linear(2, 8, steps=10)}
    found = {}
    delayed = GIVEN | RULES["delayed_sgd"]
    for name, options in {"plain": GIVEN, "schedule": schedule, "delayed": delayed}.items():
        case = Case(options, momentum=0.5)
        whole = trajectories.fit(rank, 2, case)
        within = trajectories.train(rank, 2, replace(case, saved=5), folder / name)
        found[name] = whole, within
    return found


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_what_is_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for run in run_workers(resumed, tmp_path, workers=2, timeout=120):
        for whole, within in run.values():
            assert len(whole) == 11
            assert within == whole[5:]


def compressed(rank: int) -> Any:
    """Weights of the whole fit and what was counted, with a codec and without."""
    found = []
    for compression in (None, "int8"):
        strategy = EASGDStrategy(**GIVEN, compression=compression)
        module = Given(rank, 0.5)
        trainer(2, strategy).fit(module, Steps(STEPS))
        found.append(([*module.seen, module.values()], strategy.telemetry))
    return found


def test_small_parameters_travel_in_full_precision() -> None:
    for (exact, counted), (rounded, with_codec) in run_workers(compressed, workers=2):
        small, large = ([[each[i] for each in run] for run in (exact, rounded)] for i in (2, 0))
        assert small[0] == small[1]
        assert large[0] != large[1]
        for telemetry in (counted, with_codec):
            assert telemetry.exchanges == 4  # at steps 6, 12 and 18, and the last one
            assert telemetry.exchanges_often == 11
            headers, rest = divmod(telemetry.bytes_often - 11 * 8, 64)  # a bias of 8 bytes each
            assert rest == 0
            assert 11 <= headers <= 14  # and those of idle workers
        assert counted.bytes_sent - counted.bytes_often != with_codec.bytes_sent


class Wide(Toy):
    """With a weight of 400 kB more."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        self.wide = nn.Parameter(torch.zeros(100_000))


def most_of_one_sum(rank: int) -> list[int]:
    """Bytes of the largest all-reduce, without small parameters, with them, and as asked for."""
    found, started = [], dist.all_reduce

    def noted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        found[-1] = max(found[-1], tensor.nbytes)
        return started(tensor, *args, **options)

    for options in ({}, {"often": SMALL}, {"often": SMALL, "bucket_bytes": 1000}):
        found.append(0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_reduce", noted)
            trainer(2, EASGDStrategy(tau=2, **options)).fit(Wide(), loader(rank, 4))
    return found


def test_what_small_parameters_wait_behind_is_short() -> None:
    for alike, often, asked in run_workers(most_of_one_sum, workers=2):
        assert alike == 400_000
        assert 2**16 < often <= 2**17
        assert asked <= 1000


def killed(rank: int) -> None:
    """Worker 2 ends itself between two exchanges of all parameters."""
    module = Toy(OPTIMIZERS["sgd"])

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 2 and batch_idx == 11:
            os.kill(os.getpid(), signal.SIGKILL)

    module.on_train_batch_start = on_train_batch_start
    strategy = EASGDStrategy(tau=8, often=SMALL, exchange_timeout=1.5)
    trainer(3, strategy).fit(module, loader(rank, 24))


@pytest.mark.timeout(60)
def test_the_others_end_where_a_worker_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    signs_of_life_come_often(monkeypatch)
    with Workers(killed, workers=3) as group:
        ended = group.collect(40, without=2)
    for outcome in ended:
        assert outcome.error == "ExchangeError", outcome
        assert "Worker 2 " in outcome.message
        assert "step 10" in outcome.message or "step 12" in outcome.message


def test_a_run_that_resumes_exchanges_at_multiples_whatever_it_was_saved_with() -> None:
    clock = Clock(Period(Linear(1, 61, steps=60), often=4), Telemetry())
    clock.resume(11, tau=3, next_due=13)
    assert clock.next_due == 16
    clock.resume(11, tau=4, next_due=12)
    assert clock.next_due == 12


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_period_that_is_found_by_measuring_is_a_multiple(fragments: int) -> None:
    automatic = AutomaticPeriod(Auto(max=100), fragments=fragments, often=3, log=lambda _: None)
    for exchange in (1, 10, 25, 70, 170, 320):
        for _ in range(16):
            automatic.observe(Observation([Durations(step=10_000, exchange=1000 * exchange)]))
        assert automatic.at(0) % (3 * fragments) == 0
        assert automatic.at(0) >= fragments * exchange / 10
