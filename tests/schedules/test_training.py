"""Schedules in training: all workers follow the same value, whatever happens on the way."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from toy import Resumable, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import (
    AdaptivePeriod,
    Anneal,
    ConsensusTarget,
    Cosine,
    DiLoCo,
    EASGDStrategy,
    Exponential,
    Linear,
    Rule,
    SlowMo,
    Steps,
)

LR = 0.05
SGD = partial(torch.optim.SGD, lr=LR)
ADAMW = partial(torch.optim.AdamW, lr=LR)
FRAGMENTS = {"fragments": 2}
CASES: dict[str, dict[str, Any]] = {
    "tau linear": {"tau": Linear(1, 6)},
    "tau exponential": {"tau": Exponential(8, 1, fraction=0.5)},
    "tau by steps, in fragments": {"tau": Steps([2, 6], fractions=[0.3]), **FRAGMENTS},
    "beta cosine": {"tau": 3, "beta": Cosine(0.3, 0.9)},
    "rho annealed": {"tau": 3, "rho": Anneal(1.0, 4.0, every=2)},
    "outer rate": {"tau": 3, "algorithm": SlowMo(Linear(1.0, 0.2), 0.4)},
    "adaptive tau": {"tau": AdaptivePeriod(4, sample=2)},
    "adaptive tau, in fragments": {"tau": AdaptivePeriod(4, sample=2), **FRAGMENTS},
    "adaptive tau, rho": {"tau": AdaptivePeriod(4, sample=2), "rho": 2.0},
    "adaptive tau, int8": {"tau": AdaptivePeriod(4, sample=2), "compression": "int8"},
    "adaptive tau, local SGD": {"tau": AdaptivePeriod(4, sample=2), "algorithm": "local_sgd"},
    "adaptive beta": {"tau": 2, "beta": ConsensusTarget(0.02)},
    "adaptive beta, in fragments": {"tau": 2, "beta": ConsensusTarget(0.02), **FRAGMENTS},
    "both": {"tau": AdaptivePeriod(4, sample=2), "alpha": ConsensusTarget(0.02, 0.3)},
}
PULLS = [name for name, options in CASES.items() if "algorithm" not in options]


def fit(rank: int, options: dict[str, Any], module: Toy, data: Any, **more: Any) -> Any:
    """What the run was in the end, and what telemetry said after each of this worker's steps."""
    strategy, said = EASGDStrategy(**options), []

    def on_train_batch_end(*_: Any) -> None:
        telemetry = strategy.telemetry
        said.append((telemetry.tau, telemetry.alpha, dict(telemetry.rates)))

    module.on_train_batch_end = on_train_batch_end
    trainer(3, strategy, **more).fit(module, data)
    bits = {name: value.tobytes() for name, value in weights(module).items()}
    end = strategy.telemetry.exchanges, strategy.options.rules.schedules.state(), bits
    return end, said


def uneven(rank: int) -> Any:
    return {
        (name, overlap): fit(
            rank,
            options | ({"overlap": overlap} if name in PULLS else {}),
            Toy(SGD),
            loader(rank, [40, 52, 33][rank]),
        )
        for name, options in CASES.items()
        for overlap in (True, False)
        if overlap or name in PULLS
    }


@cache
def trained() -> list[dict[tuple[str, bool], Any]]:
    return run_workers(uneven, workers=3, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_all_workers_agree_though_they_have_different_batches(name: str) -> None:
    runs = [run[name, True] for run in trained()]
    (first, longest), *others = runs[1], runs[0], runs[2]
    for end, said in others:
        assert end == first
        # An idle worker goes on with the others; while all train they say the same.
        assert said[:33] == longest[:33]
    assert len({str(value) for value in longest}) > 2, "it never changed"


@pytest.mark.parametrize("name", PULLS)
def test_overlap_changes_no_bit(name: str) -> None:
    for run in trained():
        (end, said), (blocking, told) = run[name, True], run[name, False]
        assert end == blocking
        assert [s[:2] for s in said] == [s[:2] for s in told]


def resume_all(rank: int, folder: Path) -> Any:
    return {name: [resumed(rank, folder, name, step) for step in (None, 15, 20)] for name in CASES}


def resumed(rank: int, folder: Path, name: str, step: int | None) -> Any:
    place = folder / str(list(CASES).index(name))
    saving = ModelCheckpoint(place, "{step}", every_n_train_steps=5, save_top_k=-1)
    more = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
    strategy, module = EASGDStrategy(**CASES[name]), Toy(ADAMW)
    saved = step and place / f"step={step}.ckpt"
    trainer(2, strategy, **more).fit(module, Resumable(rank, 12), ckpt_path=saved)
    bits = {name: value.tobytes() for name, value in weights(module).items()}
    telemetry = strategy.telemetry
    return bits, telemetry.tau, telemetry.exchanges, strategy.options.rules.schedules.state()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for run in run_workers(resume_all, tmp_path, workers=2, timeout=120):
        for name, (straight, *later) in run.items():
            assert later == [straight, straight], name


MEASURED: dict[str, dict[str, Any]] = {
    "easgd": {},
    "different rates": {"rho": 2.0},
    "int8": {"compression": "int8"},
    "local SGD": {"algorithm": "local_sgd"},
    "downpour": {"algorithm": "downpour"},
}


def measured(rank: int) -> Any:
    found = {}
    for name, options in MEASURED.items():
        groups = [{"lr": 0.05}, {"lr": 0.01}]
        module, brought, variances = Toy(SGD, groups=groups), [], []
        strategy = EASGDStrategy(tau=AdaptivePeriod(3, tau_min=3, tau_max=3), **options)

        def on_train_start(*, module=module, brought=brought, seen=variances, own=strategy) -> None:
            link = own._fit.exchange._link
            give, note = link.participant.contribute, link.consensus.note

            def give_and_record(*args: Any, **kwargs: Any) -> Any:
                brought.append(np.concatenate([x.ravel() for x in weights(module).values()]))
                return give(*args, **kwargs)

            def note_and_record(*args: Any) -> Any:
                observation = note(*args)
                seen.append((link.consensus.variance, observation))
                return observation

            link.participant.contribute, link.consensus.note = give_and_record, note_and_record

        module.on_train_start = on_train_start
        trainer(3, strategy).fit(module, loader(rank, 20))
        found[name] = brought, variances
    return found


def test_the_variance_that_travels_is_that_of_the_workers() -> None:
    runs = run_workers(measured, workers=3)
    for name in MEASURED:
        brought = np.array([run[name][0] for run in runs])  # worker, exchange, element
        expected = brought.var(axis=0).sum(axis=-1)
        seen = [run[name][1] for run in runs]
        assert seen[0] == seen[1] == seen[2]
        variances = [variance for variance, _ in seen[0]]
        assert len(variances) == len(expected) >= 6
        within = 0.05 if name == "int8" else 1e-9
        np.testing.assert_allclose(variances, expected, rtol=within, err_msg=name)
        # Each is told one exchange later.
        told = [observation.variance for _, observation in seen[0]]
        assert told == [None, *variances[:-1]]
        assert all(observation.lr == 0.05 for _, observation in seen[0][1:])


PHASES = [(60, 1.0), (160, 6.0), (300, 0.2)]
"""Until which step workers are pushed apart, and how strongly."""


class Pushed(Toy):
    """Workers that are pushed in directions of their own."""

    def __init__(self, rank: int) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1), dtype=torch.float64)
        self.more = torch.nn.Parameter(torch.full((50,), 10.0, dtype=torch.float64))
        generator = torch.Generator().manual_seed(rank)
        self.push = torch.randn(50, dtype=torch.float64, generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        force = next(force for until, force in PHASES if batch_idx < until)
        return force * (self.push @ self.more) + ((self.more - 10) ** 2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([self.more])


def pushed(rank: int) -> Any:
    cases = {
        "tau": {"tau": AdaptivePeriod(8, sample=4)},
        "beta": {"tau": 2, "beta": ConsensusTarget(0.05, 0.5)},
        "most": {"tau": 2, "alpha": ConsensusTarget(1e-9, 0.1)},
    }
    return {
        name: fit(rank, options, Pushed(rank), loader(rank, 300))[1]
        for name, options in cases.items()
    }


def test_adaptive_schedules_follow_workers_that_are_pushed_apart() -> None:
    """They react to a push within the phase, and to its end; what is stable is never left."""
    first, *others = run_workers(pushed, workers=3)
    assert all(run == first for run in others)
    taus = [tau for tau, _, _ in first["tau"]]
    alphas = [alpha for _, alpha, _ in first["beta"]]
    assert taus[:60] == 60 * [8]
    assert min(taus[60:160]) < 4
    assert taus[-1] > 8
    assert alphas[159] > 2 * alphas[59]
    assert alphas[-1] < alphas[59]
    most = max(alpha for _, alpha, _ in first["most"])
    assert most == pytest.approx(0.75 * 0.99 * 2 / 4)


class Lookahead(Rule):
    """The one of docs/algorithms.md, its rate by a schedule."""

    def __init__(self, slow_lr: Any) -> None:
        self.slow_lr = slow_lr

    def move_(self, center: torch.Tensor, total: torch.Tensor, state: dict[str, Any]) -> None:
        center.add_(total, alpha=self.slow_lr)


class Following(reference.LocalSgd):
    """A reference whose option is set anew at every exchange."""

    def __init__(self, rule: Any, option: str, value: Any) -> None:
        self.rule, self.option, self.value = rule, option, value
        self.state, self.delay, self.mixing_rate = rule.state, rule.delay, rule.mixing_rate
        self.calls = 0

    def move(self, moves: Any, kept: Any) -> Any:
        setattr(self.rule, self.option, self.value(4 * (1 + self.calls // 2)))  # w and b in turn
        self.calls += 1
        return self.rule.move(moves, kept)


OUTER: dict[str, tuple[Any, Any, str]] = {
    "slowmo": (lambda s: SlowMo(s, 0.4), reference.SlowMo(0, 0.4), "alpha"),
    "late": (lambda s: DiLoCo(s, 0.4, delay=2), reference.DiLoCo(0, 0.4, 2, 0.5), "lr"),
    "a user's": (Lookahead, reference.Lookahead(0), "alpha"),
}


def outer(rank: int) -> Any:
    found = {}
    for name, (make, _, _) in OUTER.items():
        for how, rate in {"schedule": Linear(1.0, 0.2), "callable": lambda t: 1 - t / 50}.items():
            if (name, how) != ("a user's", "callable"):
                module = Toy(SGD)
                strategy = EASGDStrategy(algorithm=make(rate), tau=4)
                trainer(2, strategy, max_epochs=2).fit(module, loader(rank, 20))
                found[name, how] = weights(module), strategy.telemetry.rates
    return found


def test_outer_rates_follow_a_schedule_as_their_references_do() -> None:
    """Over 40 steps; both ways say 1 - t/50."""
    for run in run_workers(outer, workers=2):
        for (name, how), (center, rates) in run.items():
            _, rule, option = OUTER[name]
            expected = reference.restarting(
                Following(rule, option, lambda t: 1 - t / 50),
                initial_weights(),
                [2 * batches(rank, 20) for rank in range(2)],
                [reference.Sgd(lambda name, t: LR) for _ in range(2)],
                tau=4,
            )
            for key, value in center.items():
                np.testing.assert_allclose(value, expected[key], atol=1e-9, err_msg=f"{name} {how}")
            (rate,) = rates.values()
            assert rate == pytest.approx(0.2)


def strengths(rank: int) -> Any:
    module = Toy(SGD)
    strategy = EASGDStrategy(tau=4, beta=Linear(0.3, 0.9))
    trainer(2, strategy, max_epochs=2).fit(module, loader(rank, 20))
    return weights(module)


def test_a_strength_follows_a_schedule_as_the_reference_does() -> None:
    expected, _ = reference.easgd(
        initial_weights(),
        [2 * batches(rank, 20) for rank in range(2)],
        [reference.Sgd(lambda name, t: LR) for _ in range(2)],
        tau=4,
        alpha=lambda name, t: (0.3 + 0.6 * t / 40) / 2,
        final_exchange=True,
    )
    for center in run_workers(strengths, workers=2):
        for key, value in center.items():
            np.testing.assert_allclose(value, expected[key], atol=1e-9)


class Manual(Toy):
    """Counts its steps by itself."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


ENDS: dict[str, tuple[Any, dict[str, int]]] = {
    "epochs without end": (partial(Toy, SGD), {"max_epochs": -1}),
    "manual optimization": (Manual, {"max_epochs": 2}),
    "steps": (partial(Toy, SGD), {"max_epochs": -1, "max_steps": 12}),
    "steps, manual optimization": (Manual, {"max_epochs": -1, "max_steps": 12}),
}


def ending(rank: int, name: str) -> int:
    make, more = ENDS[name]
    strategy = EASGDStrategy(tau=Linear(1, 4))
    trainer(1, strategy, **more).fit(make(), loader(rank, 6))
    return strategy.telemetry.tau


@pytest.mark.parametrize("name", ENDS)
def test_a_fraction_needs_an_end_that_is_known(name: str) -> None:
    (outcome,) = run_workers(ending, name, workers=1, check=False, timeout=30)
    if name.startswith("steps"):
        assert outcome.value == 4
    else:
        assert outcome.error == "ValueError"
        assert "this training has no known end" in outcome.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": Linear(0.1, 0.8)}, r"alpha=0.8 gives a moving rate .* Set alpha below 0.6667"),
        ({"beta": Cosine(1.4, 0.5)}, "beta=1.4 gives a moving rate alpha=0.7 .* below 1.333"),
        ({"beta": ConsensusTarget(0.1, most=1.5)}, "beta=1.5 gives a moving rate"),
    ],
)
def test_a_schedule_that_leaves_what_is_stable_is_refused(options: Any, message: str) -> None:
    for outcome in run_workers(refused, options, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert re.search(message, outcome.message), outcome.message


def refused(rank: int, options: dict[str, Any]) -> None:
    trainer(2, EASGDStrategy(**options)).fit(Toy(SGD), loader(rank, 2))
