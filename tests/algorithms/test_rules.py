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
from processes import run_workers
from toy import Resumable, Toy, loader, trainer, weights

from lightning_easgd import (
    BMUF,
    EASGD,
    DiLoCo,
    Downpour,
    EASGDStrategy,
    LocalSGD,
    Rule,
    SlowMo,
    TopK,
)
from lightning_easgd.algorithms import RULES, elastic


def averaged(rank: int, strategy: Any, make: Any) -> dict[str, np.ndarray]:
    module = Toy(make)
    trainer(2, strategy).fit(module, loader(rank, 50))
    return weights(module)


def test_local_sgd_at_every_step_is_gradient_averaging() -> None:
    """Over 50 steps of SGD, against DistributedDataParallel."""
    make = partial(torch.optim.SGD, lr=0.1)
    rule = EASGDStrategy(algorithm="local_sgd", tau=1)
    ours, theirs = (run_workers(averaged, s, make, workers=2) for s in (rule, "ddp"))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, r"overlap=True is not possible with LocalSGD\(\).*Remove overlap"),
        ({"tau": "auto"}, r"tau='auto' has no meaning under LocalSGD\(\).*Give tau a number"),
        ({"beta": 0.9}, r"beta=0.9 has no meaning .* how strongly workers and center pull"),
        ({"alpha": 0.0}, r"alpha=0.0 has no meaning"),
        ({"rho": lambda step: 1.0}, r"rho=.* has no meaning"),
        ({"elastic_point": "iterate"}, r"elastic_point='iterate' .* from where a worker is pulled"),
    ],
    ids=str,
)
def test_what_has_no_meaning_under_a_rule_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**{"algorithm": "local_sgd", **options})


@pytest.mark.parametrize("algorithm", ["localsgd", None, LocalSGD])
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
                parts = strategy._center.segments[0].fragments[0].center.parts
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
        (lambda: EASGD(center_momentum=1), r"center_momentum=1 .*Allowed: a number in \[0, 1\)"),
        (lambda: Downpour(average="yes"), "average='yes' is not allowed"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_its_names_and_survives_a_copy(name: str) -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        strategy = trainer(1, name + suffix).strategy
        assert isinstance(strategy, EASGDStrategy)
        assert type(strategy._rules.algorithm) is RULES[name]
    rule = RULES[name]()
    assert repr(pickle.loads(pickle.dumps(rule))) == repr(rule)


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
