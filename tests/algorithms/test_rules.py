"""What rules promise besides their mathematics: equals, bounds, and what they refuse."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from toy import Resumable, Toy, loader, trainer, weights

from lightning_easgd import (
    BMUF,
    EASGD,
    SMA,
    AdaptivePeriod,
    DiLoCo,
    Downpour,
    EASGDStrategy,
    LeaderSGD,
    Linear,
    LocalSGD,
    MDownpour,
    PostLocalSGD,
    Rule,
    SlowMo,
    TopK,
)
from lightning_easgd.algorithms import RULES, elastic
from lightning_easgd.center.flat import FlatVector


def averaged(rank: int, strategy: Any, make: Any) -> dict[str, np.ndarray]:
    module = Toy(make)
    trainer(2, strategy).fit(module, loader(rank, 50))
    return weights(module)


@pytest.mark.parametrize(
    ("rule", "outer"),
    [
        ("local_sgd", {}),
        (MDownpour(0.8, average=True), {"momentum": 0.8, "nesterov": True}),
    ],
    ids=["local_sgd", "mdownpour"],
)
def test_at_every_step_workers_average_gradients(rule: Any, outer: dict[str, Any]) -> None:
    """Over 50 steps of SGD, against DistributedDataParallel."""
    make = partial(torch.optim.SGD, lr=0.1)
    strategy = EASGDStrategy(algorithm=rule, tau=1)
    ours = run_workers(averaged, strategy, make, workers=2)
    theirs = run_workers(averaged, "ddp", partial(make, **outer), workers=2)
    for got, expected in zip(ours, theirs, strict=True):
        for key, value in got.items():
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-6)


class Slope(Toy):
    """Every step moves a worker by its own constant, wherever it is."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(partial(torch.optim.SGD, lr=1.0), dtype=dtype)
        self.more = torch.nn.Parameter(torch.zeros(700, dtype=dtype))
        self.step = torch.randn(700, dtype=dtype, generator=torch.Generator().manual_seed(rank))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -(self.step @ self.more)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([self.more])


CODECS = ["bf16", "fp16", "int8", TopK(0.3)]
ENDS = [(14, True, 14), (15, True, 15), (15, False, 14)]
"""Steps, whether there is a last exchange, and steps that the center knows of in the end; τ = 2."""


def moved(rank: int) -> Any:
    found = {}
    for codec in CODECS:
        for end in ENDS:
            for fragments in (1, 2):
                module = Slope(rank)
                strategy = EASGDStrategy(
                    algorithm="local_sgd",
                    tau=2,
                    compression=codec,
                    fragments=fragments,
                    bucket_bytes=2000,
                    final_exchange=end[1],
                )
                trainer(3, strategy).fit(module, loader(rank, end[0]))
                found[str(codec), end, fragments] = module.more.detach().numpy().copy()
    return module.step.numpy(), found


def test_nothing_is_lost_on_the_way_to_the_center() -> None:
    """Whatever a codec rounds arrives in the end, though the workers restart."""
    results = run_workers(moved, workers=3)
    mean = sum(step for step, _ in results) / 3
    for _, found in results:
        for (codec, end, fragments), center in found.items():
            if end[1] or fragments == 1:  # else each row knows of another number of steps
                np.testing.assert_allclose(center, end[2] * mean, atol=1e-9, err_msg=codec)


def moved_late(rank: int) -> Any:
    found = {}
    for codec in CODECS:
        for end in ENDS:
            module = Slope(rank)
            strategy = EASGDStrategy(
                algorithm=DiLoCo(1.0, 0.0, delay=1, mixing_rate=0.0),
                tau=2,
                compression=codec,
                bucket_bytes=2000,
                final_exchange=end[1],
            )
            trainer(3, strategy).fit(module, loader(rank, end[0]))
            found[str(codec), end] = module.more.detach().numpy().copy()
    return module.step.numpy(), found


def test_nothing_but_the_steps_of_the_delay_is_lost_on_the_way() -> None:
    """Of 7 exchanges the first is of two steps, the others of one: the other is given up."""
    results = run_workers(moved_late, workers=3)
    mean = sum(step for step, _ in results) / 3
    for _, found in results:
        for (codec, _end), center in found.items():
            np.testing.assert_allclose(center, 8 * mean, atol=1e-9, err_msg=codec)


RATES = 7 * [1.0] + 14 * [0.25]


def restarted(rank: int) -> Any:
    """How far a worker came by its steps, and where it and the center are in the end."""
    found = {}
    for codec in [None, *CODECS]:
        for fragments in (1, 2):
            module, given_up = Slope(rank), torch.zeros(700, dtype=torch.float64)
            strategy = EASGDStrategy(
                algorithm=SMA(0.0),
                tau=4,
                compression=codec,
                fragments=fragments,
                bucket_bytes=2000,
                final_exchange=False,
            )
            with_hooks(module, strategy, given_up)
            trainer(3, strategy).fit(module, loader(rank, len(RATES)))
            ends = module.end, module.more.detach(), given_up
            found[str(codec), fragments] = [end.numpy() for end in ends]
    return module.step.numpy() * sum(RATES), found


def held_back(strategy: EASGDStrategy) -> torch.Tensor:
    """Of the parameter ``more``, by this worker."""
    strategy._fit.exchange.drain()
    accounts = strategy._fit.exchange._link.all_reduce.state()["accounts"]
    held = torch.zeros(700, dtype=torch.float64)
    for fragment in strategy._fit.center.cohorts[0].fragments:
        saved = accounts[f"{fragment.name}, torch.float64"]["residual"]
        vector = FlatVector(fragment.layout, {torch.float64: saved})
        for slice_, view in fragment.values(vector):
            if slice_.name == "more":
                slice_.of(held).add_(view)
    return held


def with_hooks(module: Slope, strategy: EASGDStrategy, given_up: torch.Tensor) -> None:
    """Let the learning rate fall, and note what a worker gives up at a reset, and its end."""

    def on_train_start() -> None:
        reset = strategy._fit.center.main.reset_worker

        def noted() -> None:
            given_up.add_(module.more.detach())
            reset()
            given_up.sub_(module.more.detach())

        strategy._fit.center.main.reset_worker = noted

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        strategy.optimizers[0].param_groups[0]["lr"] = RATES[batch_idx]

    def on_train_epoch_end() -> None:
        module.end = module.more.detach().clone()
        if isinstance(strategy.options.codec, TopK):  # at the end, workers take back what they hold
            module.end += held_back(strategy)

    for hook in (on_train_start, on_train_batch_start, on_train_epoch_end):
        setattr(module, hook.__name__, hook)


def test_a_restart_gives_up_nothing_but_what_workers_kept_for_themselves() -> None:
    """What a worker has lost to the center arrives there, however much a codec holds back."""
    results = run_workers(restarted, workers=3)
    steps = sum(came for came, _ in results)
    for codec in results[0][1]:
        ends, centers, given_up = zip(*(found[codec] for _, found in results), strict=True)
        assert all(np.abs(own).max() > 0.1 for own in given_up)
        assert all(np.array_equal(center, centers[0]) for center in centers)
        np.testing.assert_allclose(sum(ends) + centers[0] + sum(given_up), steps, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, r"overlap=True is not possible with LocalSGD\(\).*Remove overlap"),
        ({"tau": "auto"}, r"tau='auto' is not possible with LocalSGD\(\).*Give tau a number"),
        ({"beta": 0.9}, r"beta=0.9 is not possible .* how strongly workers and center pull"),
        ({"alpha": 0.0}, r"alpha=0.0 is not possible"),
        ({"rho": lambda step: 1.0}, r"rho=.* is not possible"),
        ({"elastic_point": "iterate"}, r"elastic_point='iterate' .* from where worker and center"),
    ],
    ids=["overlap", "tau", "beta", "alpha", "rho", "elastic_point"],
)
def test_what_has_no_meaning_under_a_rule_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**{"algorithm": "local_sgd", **options})


@pytest.mark.parametrize("algorithm", ["localsgd", 1, LocalSGD])
def test_an_unknown_rule_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"algorithm=.*Allowed: 'easgd', 'local_sgd'.*Rule"):
        EASGDStrategy(algorithm=algorithm)


def unlike(rank: int) -> None:
    trainer(2, EASGDStrategy(algorithm=["easgd", "local_sgd"][rank])).fit(
        Toy(partial(torch.optim.SGD, lr=0.1)), loader(rank, 2)
    )


def test_workers_with_different_rules_are_told() -> None:
    outcomes = run_workers(unlike, workers=2, check=False)
    assert all("algorithm=LocalSGD()" in outcome.message for outcome in outcomes)


def resting(rank: int) -> Any:
    """The center's bits from when on nothing is learned any more, under half precision."""
    found = {}
    for rule in ("local_sgd", "downpour"):
        module, seen = Toy(partial(torch.optim.SGD, lr=0.05), dtype=torch.bfloat16), []
        strategy = EASGDStrategy(algorithm=rule, tau=2)

        def rest(batch: Any, batch_idx: int, strategy: Any = strategy, seen: Any = seen) -> None:
            if batch_idx >= 8:
                strategy.optimizers[0].param_groups[0]["lr"] = 0.0
                parts = strategy._fit.center.cohorts[0].fragments[0].center.parts
                seen.append([part.clone().numpy() for part in parts])

        module.on_train_batch_start = rest
        trainer(2, strategy).fit(module, loader(rank, 16, torch.bfloat16))
        found[rule] = seen, weights(module)
    return found


def test_what_half_precision_rounds_moves_no_center() -> None:
    """Workers restart at the center as they can hold it, and their moves count from there."""
    for found in run_workers(resting, workers=2):
        for seen, end in found.values():
            assert all(np.array_equal(part, seen[0][0]) for (part,) in seen)
            held = np.concatenate([value.ravel() for value in end.values()])
            assert not np.array_equal(held, seen[0][0])


def other_fragments(rank: int, folder: Path, fragments: int) -> Any:
    module = Toy(partial(torch.optim.SGD, lr=0.05))
    saving = ModelCheckpoint(folder, filename=str(fragments), every_n_train_steps=6)
    strategy = EASGDStrategy(algorithm="slowmo", tau=4, fragments=fragments)
    saved = folder / "2.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: warned.append(str(message)))
        trainer(2, strategy, enable_checkpointing=True, callbacks=[saving]).fit(
            module, Resumable(rank, 8), ckpt_path=saved if saved.exists() else None
        )
    return [message for message in warned if "starts afresh" in message]


def test_momentum_that_belongs_to_other_fragments_starts_afresh_and_says_so(tmp_path: Path) -> None:
    assert run_workers(other_fragments, tmp_path, 2, workers=2) == [[], []]
    (message,), others = run_workers(other_fragments, tmp_path, 1, workers=2)
    assert "momentum starts afresh" in message
    assert "SlowMo in 1 fragment(s)" in message
    assert others == []


with_leader = partial(EASGDStrategy, algorithm="leader_sgd")
late = partial(EASGDStrategy, algorithm=DiLoCo(delay=5))


def radius(rule: Rule) -> float:
    """By what the center and its momentum grow in an exchange, where workers always reach 0."""
    c, memory = torch.ones(1, dtype=torch.float64), {}
    sizes = []
    for _ in range(400):
        rule.move_(c, -c.clone(), memory)
        sizes.append(float(c.abs()) + sum(float(v.abs()) for v in memory.values()))
    return (sizes[-1] / sizes[199]) ** (1 / 200)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (SlowMo, lambda mu: 2 * (1 + mu)),
        (BMUF, lambda mu: 2 * (1 + mu)),
        (DiLoCo, lambda mu: 2 * (1 + mu) / (1 + 2 * mu)),
    ],
)
def test_stable_outer_rates_separate_convergence_from_divergence(
    make: Any, bound: Any, momentum: float
) -> None:
    assert radius(make(0.99 * bound(momentum), momentum)) < 1
    rule = make(0.5, momentum)
    rule.outer_lr = rule.block_lr = 1.01 * bound(momentum)
    assert radius(rule) > 1
    with pytest.raises(ValueError, match=r"_lr=.* is not stable .*Allowed: a number in \(0, "):
        make(bound(momentum), momentum)


@pytest.mark.parametrize("p", [1, 2, 4, 16])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_momentum_of_the_center_widens_what_is_stable(p: int, mu: float) -> None:
    """α < 2(1+μ)/(p+1+μ), which the bound without momentum is within."""
    bound = 2 * (1 + mu) / (p + 1 + mu)
    assert elastic.stability_bound(p) <= bound

    def distance(alpha: float) -> float:
        x, c = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        memory: dict[str, Any] = {}
        for _ in range(1000):
            pull = alpha * (x - c)
            EASGD(mu).move_(c, p * pull, memory)
            x = x - pull
        return float((x - c).abs())

    assert distance(0.98 * bound) < 1e-3
    assert distance(1.02 * bound) > 1e3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlowMo(outer_momentum=1.0), r"outer_momentum=1.0 .*Allowed: a number in \[0, 1\)"),
        (lambda: SlowMo(outer_lr=0), r"outer_lr=0 .*Allowed: a number in \(0, 3\)"),
        (lambda: BMUF(block_momentum=-0.1), "block_momentum=-0.1"),
        (lambda: BMUF(block_lr="x"), "block_lr='x'"),
        (lambda: DiLoCo(1.4), r"outer_lr=1.4 .*Allowed: a number in \(0, 1.357\)"),
        (lambda: DiLoCo(outer_momentum=True), "outer_momentum=True"),
        (lambda: DiLoCo(-1, optimizer=torch.optim.Adam), "Allowed: a positive number"),
        (lambda: DiLoCo(0.7, 0.9, optimizer=torch.optim.Adam), "is that of the default optimizer"),
        (lambda: DiLoCo(optimizer=torch.optim.LBFGS), "cannot move a flat tensor .*closure"),
        (lambda: DiLoCo(optimizer=torch.optim.Adam, taw=1), "unexpected keyword argument 'taw'"),
        (lambda: DiLoCo(optimizer="adam"), "optimizer='adam'"),
        (lambda: DiLoCo(delay=-1), r"delay=-1 .*a whole number of steps, at least 0"),
        (lambda: DiLoCo(delay=True), "delay=True is not allowed"),
        (lambda: DiLoCo(mixing_rate=1), r"mixing_rate=1 .*Allowed: a number in \[0, 1\)"),
        (lambda: late(tau=4), r"delay=5 with tau=4 and fragments=1 .*tau of at least 5, or"),
        (lambda: late(tau=8, fragments=2), r"delay=5 with tau=8 .*tau of at least 10, or delay=0"),
        (lambda: late(tau="auto"), "delay=5 with tau='auto' .*a number tau"),
        (lambda: late(tau=Linear(8, 16)), r"delay=5 with tau=Linear\(.* .*a number tau"),
        (lambda: EASGD(center_momentum=1), r"center_momentum=1 .*Allowed: a number in \[0, 1\)"),
        (lambda: EASGD(pull=0), r"pull=0 .*Allowed: a number in \(0, 1\], or None"),
        (lambda: EASGD(pull=0.4, look_ahead=-1), "look_ahead=-1 .*a number of at least 0"),
        (lambda: EASGD(look_ahead=1), "look_ahead=1 is not possible without pull.*Give pull"),
        (lambda: EASGD(0.5, pull=0.4), "pull=0.4 is not possible with center_momentum=0.5"),
        (lambda: SMA(-0.1), r"center_momentum=-0.1 .*Allowed: a number in \[0, 1\)"),
        (lambda: SMA(lr_drop=1), r"lr_drop=1 .*Allowed: a number in \(0, 1\)"),
        (lambda: Downpour(average="yes"), "average='yes' is not allowed"),
        (lambda: MDownpour(average=1), "average=1 is not allowed"),
        (lambda: MDownpour(1.0), r"momentum=1.0 .*Allowed: a number in \[0, 1\)"),
        (lambda: LeaderSGD(0), r"pull=0 .*Allowed: a number in \(0, 1\]"),
        (lambda: LeaderSGD(loss_smoothing=1), r"loss_smoothing=1 .*Allowed: a number in \[0, 1\)"),
        (lambda: with_leader(fragments=2), r"fragments=2 is not possible with LeaderSGD"),
        (lambda: with_leader(compression="int8"), "compression='int8' .*Allowed: compression=None"),
        (lambda: with_leader(tau=AdaptivePeriod(4)), "tau=AdaptivePeriod.* tells no variance"),
        (lambda: with_leader(alpha=0.5), "alpha=0.5 is not possible with LeaderSGD"),
        (lambda: PostLocalSGD(-1), "warm_up=-1 is not allowed.*at least 0"),
        (lambda: PostLocalSGD(2.5), "warm_up=2.5"),
        (lambda: PostLocalSGD(True), "warm_up=True"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bmuf_is_slowmo_with_another_scale_of_what_it_keeps() -> None:
    """While the rate is constant; a half scales without rounding, so that bits are equal."""
    centers, memories = torch.zeros(2, 5), ({}, {})
    for rule, center, memory in zip(
        (SlowMo(0.5, 0.3), BMUF(0.5, 0.3)), centers, memories, strict=True
    ):
        generator = torch.Generator().manual_seed(0)
        for _ in range(7):
            rule.move_(center, torch.randn(5, generator=generator), memory)
    assert torch.equal(*centers)
    assert torch.equal(0.5 * memories[0]["momentum"], memories[1]["momentum"])


@pytest.mark.parametrize("tau", [2, lambda step: 1, Linear(1, 2), "auto"])
def test_a_period_that_a_rule_cannot_is_refused(tau: Any) -> None:
    with pytest.raises(ValueError, match=r"tau=.* is not possible with MDownpour.*Allowed: tau=1"):
        EASGDStrategy(algorithm="mdownpour", tau=tau)
    assert str(EASGDStrategy(algorithm="mdownpour").options.rules.period) == "1"
    assert str(EASGDStrategy().options.rules.period) == "10"


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_its_names_and_survives_a_copy(name: str) -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        strategy = trainer(1, name + suffix).strategy
        assert isinstance(strategy, EASGDStrategy)
        assert type(strategy.options.rules.algorithm) is RULES[name]
    rule = RULES[name]()
    assert repr(pickle.loads(pickle.dumps(rule))) == repr(rule)


def beside_torch(rank: int) -> Any:
    """After 7 steps of averaged gradients both average the workers after steps 8, 12, 16, ..."""
    found = []
    for make in (partial(torch.optim.SGD, lr=0.05), partial(torch.optim.AdamW, lr=0.05)):
        ours, theirs = Toy(make), Toy(make)
        strategy = EASGDStrategy(algorithm=PostLocalSGD(warm_up=7), tau=4)
        trainer(3, strategy).fit(ours, loader(rank, 40))
        averager = PeriodicModelAverager(period=4, warmup_steps=7)
        optimizer = theirs.configure_optimizers()
        for step, batch in enumerate(loader(rank, 40)):
            optimizer.zero_grad()
            theirs.training_step(batch, step).backward()
            if step < 7:
                for parameter in theirs.parameters():
                    dist.all_reduce(parameter.grad.div_(3))
            optimizer.step()
            averager.average_parameters(theirs.parameters())
        found.append((weights(ours), weights(theirs)))
    return found


def test_post_local_sgd_agrees_with_torch() -> None:
    """With SGD and AdamW, against torch's averager and averaged gradients before."""
    for run in run_workers(beside_torch, workers=3):
        for ours, theirs in run:
            for key, value in ours.items():
                np.testing.assert_allclose(value, theirs[key], rtol=0, atol=1e-6)


class Peers:
    """What torchft's DiLoCo asks of its manager, on the default process group."""

    _use_async_quorum = False

    def __init__(self) -> None:
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        assert name in {
            "allow_state_dict_read",
            "disallow_state_dict_read",
            "register_state_dict_fn",
            "start_quorum",
        }
        return lambda *_, **__: None

    def current_step(self) -> int:
        return self.steps

    def should_commit(self) -> bool:
        self.steps += 1
        return True

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False) -> Any:
        dist.all_reduce(tensor.div_(dist.get_world_size()))
        return SimpleNamespace(wait=lambda: None)


def beside_torchft(rank: int) -> Any:
    from torchft.local_sgd import DiLoCo as TorchftDiLoCo

    make = partial(torch.optim.AdamW, lr=0.05)
    ours = Toy(make)
    strategy = EASGDStrategy(algorithm=DiLoCo(0.7, 0.9), tau=4)
    trainer(2, strategy).fit(ours, loader(rank, 40))
    theirs = Toy(make)
    inner = theirs.configure_optimizers()
    outer = torch.optim.SGD(theirs.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    with TorchftDiLoCo(Peers(), [theirs], inner, outer, sync_every=4):
        for batch in loader(rank, 40):
            inner.zero_grad()
            theirs.training_step(batch, 0).backward()
            inner.step()
    return weights(ours), weights(theirs)


def test_diloco_agrees_with_torchft() -> None:
    """Over 10 outer steps on the same gradients."""
    pytest.importorskip("torchft", reason='pip install -e ".[peers]"')
    for ours, theirs in run_workers(beside_torchft, workers=2):
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=0, atol=1e-5)
