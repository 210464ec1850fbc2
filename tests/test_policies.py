"""What becomes of each buffer in the center: by pattern, by what it is, and what is said of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from staying import run_workers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm as hooked_spectral_norm
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.flat import Memory
from lightning_easgd.center.policies import Policies
from lightning_easgd.center.spectral import leading_vectors
from lightning_easgd.center.statistics import Statistics

SGD = partial(torch.optim.SGD, lr=0.1)
CPU = Memory(torch.device("cpu"))


class Zoo(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)
        self.linear = parametrizations.spectral_norm(nn.Linear(3, 3))
        self.hooked = hooked_spectral_norm(nn.Linear(3, 3))
        self.observer = torch.ao.quantization.MovingAverageMinMaxObserver()
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


NORMS = [f"{n}.running_{s}" for n in ("norm", "instance") for s in ("mean", "var")]
VECTORS = [
    "linear.parametrizations.weight.0._u",
    "linear.parametrizations.weight.0._v",
    "hooked.weight_u",
    "hooked.weight_v",
]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*is deprecated")
@pytest.mark.parametrize(
    ("buffers", "shared"),
    [
        ("average", [*NORMS, "queue"]),
        ("broadcast", [*NORMS, "queue"]),
        ("local", []),
        ({}, [*NORMS, "queue"]),
        ({"queue": "local"}, NORMS),
        ({"norm.*": "broadcast", "*": "local"}, NORMS[:2]),
        ({"*": "average"}, [*NORMS, *VECTORS, "queue", "cache", "phase"]),
        ({"cache": "average"}, [*NORMS, "queue", "cache"]),
        ({"phase": "broadcast"}, [*NORMS, "queue", "phase"]),
        ({"teacher.*": "average"}, [*NORMS, "queue", "teacher.weight", "teacher.bias"]),
        ({"*._[uv]": "local", "hooked.*": "recompute"}, [*NORMS, "queue"]),
    ],
)
def test_what_is_shared(buffers: Any, shared: list[str]) -> None:
    statistics = Statistics(Zoo(), buffers, 0, CPU)
    observed = ["observer.min_val", "observer.max_val", "observer.eps"]
    shared = shared + (observed if buffers == {"*": "average"} else [])
    assert set(statistics.names) - {"observer.eps"} == set(shared) - {"observer.eps"}
    recomputed = set(statistics.tensors()) - set(statistics.names)
    if isinstance(buffers, str) or "*" not in buffers:
        expected = VECTORS[2:] if "hooked.*" in buffers else VECTORS
        assert recomputed == set(expected)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*is deprecated")
@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"quue": "local"}, r"names no buffer.*'queue'"),
        ({"norm.weight": "average"}, "trained and so exchanged elastically"),
        ({"queue": "recompute"}, "only the vectors u and v"),
        ({"count": "average"}, "only dense tensors.*'local'"),
    ],
)
def test_a_pattern_without_use_is_an_error(buffers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics(Zoo(), buffers, 0, CPU)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ("recompute", "Allowed: 'average', 'local', 'broadcast'"),
        ({"queue": "mean"}, r"buffers\['queue'\]='mean'.*'recompute'"),
        ({1: "local"}, "1 is no name"),
        (["queue"], "Allowed: 'average'"),
    ],
)
def test_what_is_no_policy_is_refused_at_once(buffers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(buffers=buffers)


def test_a_configuration_may_hold_them() -> None:
    config = OmegaConf.create({"queue": "local", "teacher.*": "average"})
    policies = Policies.check(config)
    assert policies == Policies.check({"queue": "local", "teacher.*": "average"})
    assert policies.patterns == (("queue", "local"), ("teacher.*", "average"))


def test_workers_compare_policies() -> None:
    assert str(Policies.check("local")) == "local"
    assert str(Policies.check({"a": "local"})) == "{'a': 'local'}"
    lines = EASGDStrategy(buffers={"a": "local"}).options.lines()
    assert "buffers={'a': 'local'}" in lines


class Moving(Toy):
    """Every float buffer, and a teacher, is the worker's number plus one after a step."""

    def __init__(self) -> None:
        super().__init__(SGD, dtype=torch.float32)
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        for name in ("queue", "ema", "constant"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("low", torch.zeros(2, dtype=torch.bfloat16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            moving = self.queue, self.ema, self.low, self.teacher.weight, self.teacher.bias
            for tensor in moving:
                tensor.fill_(1.0 + self.global_rank)
        return super().training_step(batch, batch_idx)


def move(rank: int, options: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    module, own = Moving(), []
    module.on_train_batch_end = lambda *_: own.append(float(module.queue[0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting = trainer(3, EASGDStrategy(tau=2, **options))
        fitting.fit(module, loader(rank, 6, torch.float32))
    assert set(own) == {1.0 + rank}  # averaging never writes to a worker
    said = [str(w.message) for w in caught if "over the workers" in str(w.message)]
    return {k: float(v.float().mean()) for k, v in module.state_dict().items()}, said


@pytest.mark.parametrize("overlap", [True, False])
def test_each_buffer_has_its_policy(overlap: bool) -> None:
    policies = {"queue": "local", "low": "broadcast", "e*": "average", "teacher.*": "average"}
    ended = run_workers(move, {"buffers": policies, "overlap": overlap}, workers=3)
    for rank, (state, said) in enumerate(ended):
        assert state["queue"] == 1.0 + rank
        assert state["low"] == 1.0
        assert state["ema"] == state["teacher.weight"] == state["teacher.bias"] == 2.0
        assert state["constant"] == 0.0
        assert said == []


def test_what_is_averaged_without_a_choice_is_said_once_by_worker_0() -> None:
    (first, said), *others = run_workers(move, {}, workers=3)
    assert len(said) == 1
    for name in ("'queue'", "'ema'", "'low'"):
        assert name in said[0]
    assert "constant" not in said[0]
    assert "EASGDStrategy(buffers={" in said[0]
    assert first["queue"] == first["ema"] == first["low"] == 2.0
    assert all(said == [] for _, said in others)


def unfreeze(rank: int) -> None:
    module = Moving()
    module.on_train_batch_start = lambda batch, i: module.teacher.requires_grad_(i > 2) and None
    strategy = EASGDStrategy(tau=2, buffers={"teacher.*": "average", "*": "average"})
    trainer(2, strategy).fit(module, loader(rank, 8, torch.float32))


def test_a_frozen_parameter_with_a_policy_stays_frozen() -> None:
    for outcome in run_workers(unfreeze, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "'teacher.bias' is trained from now on" in outcome.message


def parametrized(make: Callable[[], nn.Module]) -> nn.Module:
    return parametrizations.spectral_norm(make())


def behind_another(make: Callable[[], nn.Module]) -> nn.Module:
    return parametrizations.spectral_norm(parametrizations.weight_norm(make(), dim=None))


class Spectral(Toy):
    """Divided by its largest singular value, in training on other data on every worker."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        super().__init__(SGD, dtype=torch.float32)
        torch.manual_seed(1)
        self.net = nn.Sequential(
            norm(lambda: nn.Conv1d(3, 8, 3, padding=1, dtype=dtype)),
            nn.Flatten(),
            norm(lambda: nn.Linear(8, 16, dtype=dtype)),
            nn.Linear(16, 2, dtype=dtype),
        )
        self.seen: list[list[float]] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        dtype = self.net[3].weight.dtype
        return (self.net(x.to(dtype)[:, :, None]).float() * 3 - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        self.seen.append(largest(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


@torch.no_grad()
def largest(module: Spectral) -> list[float]:
    weights = [module.net[at].weight.float().flatten(1) for at in (0, 2)]
    return [float(torch.linalg.matrix_norm(weight, 2)) for weight in weights]


def vectors(module: nn.Module) -> dict[str, np.ndarray]:
    names = ("_u", "_v")
    state = module.state_dict()
    return {k: v.float().numpy().copy() for k, v in state.items() if k.endswith(names)}


def fit_spectral(rank: int, norm: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    module, own = Spectral(norm, dtype), []
    strategy = EASGDStrategy(tau=5, **options)
    module.on_train_batch_end = lambda *_: own.append(vectors(module))
    fitting = trainer(2, strategy, val_check_interval=5, num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 20, torch.float32), loader(0, 1, torch.float32))
    module.eval()
    with torch.no_grad():
        module.loss(loader(0, 1, torch.float32).dataset[0])
    return module.seen, largest(module), vectors(module), own


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*is deprecated")
@pytest.mark.parametrize(
    ("norm", "dtype", "options"),
    [
        (parametrized, torch.float32, {}),
        (parametrized, torch.float64, {"overlap": False, "fragments": 5}),
        (parametrized, torch.float32, {"algorithm": "local_sgd", "center_average": "polyak"}),
        (lambda make: hooked_spectral_norm(make()), torch.float32, {}),
        (behind_another, torch.float32, {}),
    ],
    ids=["parametrized", "fragments", "average", "hooked", "behind another"],
)
def test_the_centers_weight_has_its_own_spectral_norm(
    norm: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    results = run_workers(fit_spectral, norm, dtype, options, workers=2)
    for seen, delivered, own, trained in results:
        assert len(seen) == 4
        for values in [*seen, delivered]:
            np.testing.assert_allclose(values, 1.0, atol=1e-4)
        assert {k: v.tobytes() for k, v in own.items()} == {
            k: v.tobytes() for k, v in results[0][2].items()
        }
        # A validation leaves the worker's vectors as its own steps made them.
        assert all((trained[9][k] != own[k]).any() for k in own)
    assert any((results[0][3][9][k] != results[1][3][9][k]).any() for k in results[0][2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 40), (64, 64), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_leading_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(shape) * 100).to(dtype)
    u, v = leading_vectors(matrix)
    expected = torch.linalg.matrix_norm(matrix.double(), 2)
    found = u.double() @ matrix.double() @ v.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert float(u.norm()) == pytest.approx(1.0, abs=1e-6)
    assert all(map(torch.equal, leading_vectors(matrix.clone()), (u, v)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_leading_vectors_of_extreme_weights_are_finite(value: float) -> None:
    u, v = leading_vectors(torch.full((4, 3), value))
    assert bool(torch.cat([u, v]).isfinite().all())
    assert float(v.norm()) == pytest.approx(1.0 if value else 0.0, abs=1e-6)


def test_vectors_of_a_weight_that_is_not_finite_stay() -> None:
    module = parametrizations.spectral_norm(nn.Linear(3, 3))
    before = {k: v.clone() for k, v in module.named_buffers()}
    statistics = Statistics(module, "average", 0, CPU)
    with torch.no_grad():
        module.parametrizations.weight.original[0, 0] = math.inf
    statistics.load_center()
    assert all(torch.equal(v, before[k]) for k, v in module.named_buffers())
