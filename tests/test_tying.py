"""Parameters, frozen views and buffers that share memory: exchanged and averaged once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_in_turn, run_workers
from torch import Tensor, nn
from toy import bits, loader, trainer

from lightning_easgd import DiLoCo, EASGDStrategy, Groups
from lightning_easgd.center import policies, tying
from lightning_easgd.center.storage import Shares, seen_from, shares
from lightning_easgd.center.tying import Ties

SGD = partial(torch.optim.SGD, lr=0.1)
NESTEROV = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


class Tied(pl.LightningModule):
    """Trains ``w`` (3, 2), or in its place a twin of it that has the same memory, transposed."""

    def __init__(self, trained: str, make: Any, twin: bool = True, dtype: Any = None) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 6, dtype=dtype).view(3, 2)
        if twin or trained == "w":
            self.w = nn.Parameter(start)
        if twin or trained == "twin":
            self.twin = nn.Parameter(start.t())
        if twin:
            self.register_buffer("row", self.w.data[1:2])
            self.view = nn.Parameter(self.w.data[:, 1], requires_grad=False)
        self.trained, self.make = trained, make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weight = self.w if self.trained == "w" else self.twin.t()
        return ((x @ weight - y) ** 2).mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return self.make([getattr(self, self.trained)])


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.float().numpy().copy() for key, value in module.state_dict().items()}


def fit(
    rank: int, workers: int, trained: str, twin: bool, make: Any, options: dict[str, Any]
) -> Any:
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    module, strategy = Tied(trained, make, twin, dtype), EASGDStrategy(tau=4, **options)
    centers: list[Any] = []

    def look() -> None:
        state = strategy.center_state_dict()
        centers.append({key: value.float().numpy().copy() for key, value in state.items()})

    module.on_train_batch_end = lambda *_: look()
    module.on_validation_batch_end = lambda *_: centers.append(arrays(module))
    fitting = trainer(workers, strategy, val_check_interval=3, num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 10, dtype), loader(0, 1, dtype))
    return [*centers, arrays(module)], strategy.telemetry.bytes_sent


@pytest.mark.parametrize("trained", ["w", "twin"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SGD, {}),
        (SGD, {"overlap": False, "dtype": torch.bfloat16}),
        (SGD, {"rho": 1.0}),
        (NESTEROV, {"fragments": 2}),
        (NESTEROV, {"rho": 1.0, "dtype": torch.float64}),
        (SGD, {"algorithm": DiLoCo(), "center_average": "ema"}),
        (SGD, {"compression": "bf16", "groups": 2}),
        (SGD, {"groups": Groups(2, tau=2)}),
    ],
    ids=["plain", "bf16", "rho", "fragments", "nesterov", "diloco", "groups", "centers"],
)
def test_one_storage_is_exchanged_once_under_both_names(
    trained: str, make: Any, options: dict[str, Any]
) -> None:
    """Workers and centers are those of a module that has one of the names only.

    But for the order of sums over the workers, which goes by the place in memory.
    """
    half = options.get("dtype") is torch.bfloat16
    if trained == "twin" and "fragments" in options:
        options = {}  # they are cut along other dimensions
    workers = 4 if "groups" in options else 2
    cases = [(workers, trained, twin, make, options) for twin in (False, True)]
    one, both = run_in_turn(fit, cases, workers=workers)
    for (expected, sent), (found, sent_too) in zip(one, both, strict=True):
        assert sent == sent_too
        for plain, state in zip(expected, found, strict=True):
            weight = plain["w"] if trained == "w" else plain["twin"].T
            np.testing.assert_allclose(state["w"], weight, rtol=1e-2 if half else 1e-4)
            np.testing.assert_array_equal(state["twin"].T, state["w"])
            np.testing.assert_array_equal(state["row"], state["w"][1:2])
            np.testing.assert_array_equal(state["view"], state["w"][:, 1])


class Refused(Tied):
    def __init__(self, kind: str) -> None:
        super().__init__("w", SGD, twin=False)
        self.other = {
            "rows": lambda: nn.Parameter(self.w.data[1:]),
            "expanded": lambda: nn.Parameter(torch.zeros(1, 4).expand(8, 4)),
            "sparse": lambda: nn.Parameter(torch.eye(3).to_sparse()),
            "bits": lambda: nn.Parameter(self.w.data.view(torch.bfloat16)),
        }[kind]()


def fit_refused(rank: int, kind: str) -> None:
    trainer(2, EASGDStrategy(tau=2)).fit(Refused(kind), loader(rank, 2, torch.float32))


def test_a_sparse_parameter_is_refused_by_name() -> None:
    for outcome in run_workers(fit_refused, "sparse", workers=2, check=False):
        assert outcome.error == "TypeError"
        assert "Parameter 'other' is a sparse_coo tensor" in outcome.message


@pytest.mark.parametrize("kind", ["rows", "expanded", "bits"])
def test_what_shares_a_part_is_refused_by_name(kind: str) -> None:
    for outcome in run_workers(fit_refused, kind, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "'other'" in outcome.message
        assert ("'w' (3, 2)" in outcome.message) == (kind != "expanded")
        assert "forward()" in outcome.message


class Interleaved(Refused):
    """Two parameters in one storage that have no element in common."""

    def __init__(self) -> None:
        Tied.__init__(self, "w", SGD, twin=False)
        whole = torch.zeros(3, 4)
        self.w, self.odd = nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 1::2])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.odd += self.global_rank * (batch_idx == 0)


def fit_interleaved(rank: int) -> Any:
    module = Interleaved()
    trainer(2, EASGDStrategy(tau=2, beta=1.0)).fit(module, loader(rank, 2, torch.float32))
    return arrays(module)


def test_parameters_that_share_no_element_are_two() -> None:
    first, second = run_workers(fit_interleaved, workers=2)
    assert bits(first) == bits(second)
    np.testing.assert_array_equal(first["odd"], 0.5)


class Later(Tied):
    """The second name is unfrozen in the second epoch, and then both are trained."""

    def __init__(self, first: str) -> None:
        super().__init__("w", SGD)
        self.first = first

    def configure_optimizers(self) -> Any:
        self.w.requires_grad_(self.first == "w" or self.current_epoch > 0)
        self.twin.requires_grad_(self.first == "twin" or self.current_epoch > 0)
        return torch.optim.SGD([self.w, self.twin], lr=0.1, momentum=0.5)

    def on_train_epoch_start(self) -> None:
        self.w.requires_grad_(self.first == "w" or self.current_epoch > 0)
        self.twin.requires_grad_(self.first == "twin" or self.current_epoch > 0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return ((x @ self.w - y) ** 2).mean() + ((x @ self.twin.t() + y) ** 2).mean()


def fit_later(rank: int, first: str, validates: bool, folder: Path) -> Any:
    def go(path: Path | None, epochs: int) -> tuple[dict[str, np.ndarray], int]:
        place = folder / f"of {epochs} from {path is None}"
        saver = ModelCheckpoint(place, save_last=True, save_on_train_epoch_end=not validates)
        module = Later(first)
        strategy = EASGDStrategy(tau=3, rho=0.5)
        options = {"max_epochs": epochs, "callbacks": [saver], "enable_checkpointing": True}
        fitting = trainer(2, strategy, **options)
        seen: list[int] = []
        module.on_train_end = lambda: seen.append(len(strategy._fit.center.cohorts))
        data = [loader(rank, 7, torch.float32), loader(0, 1, torch.float32)]
        fitting.fit(module, *data[: 1 + validates], ckpt_path=path)
        return arrays(module), seen[0]

    whole, cohorts = go(None, 3)
    go(None, 2)
    resumed, _ = go(folder / "of 2 from True" / "last.ckpt", 3)
    return whole, resumed, cohorts


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("first", ["w", "twin"])
def test_a_second_name_that_is_unfrozen_later_adds_nothing(
    first: str, validates: bool, tmp_path: Path
) -> None:
    """Nor does it where the module holds the center when it is saved."""
    results = run_workers(fit_later, first, validates, tmp_path, workers=2)
    for whole, resumed, cohorts in results:
        assert cohorts == 1
        assert bits(whole) == bits(resumed) == bits(results[0][0])
        np.testing.assert_array_equal(whole["w"], whole["twin"].T)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (lambda w: w, lambda w: w.t(), Shares.ALL),
        (lambda w: w, lambda w: w.reshape(2, 6), Shares.ALL),
        (lambda w: w[:, ::2], lambda w: w[:, ::2].t(), Shares.ALL),
        (lambda w: w[:, ::2], lambda w: w[:, 1::2], Shares.NOTHING),
        (lambda w: w[:2], lambda w: w[2:], Shares.NOTHING),
        (lambda w: w[:2], lambda w: w[1:], Shares.PART),
        (lambda w: w[:, ::2], lambda w: w[0], Shares.PART),
        (lambda w: w[:1].expand(5, 4), lambda w: w[0], Shares.ALL),
    ],
)
def test_what_is_shared(one: Any, other: Any, expected: Shares) -> None:
    w = torch.arange(12.0).view(3, 4)
    assert shares(one(w), other(w)) is shares(other(w), one(w)) is expected
    if expected is Shares.ALL:
        values = other(w).clone()
        assert torch.equal(seen_from(one(w), other(w), values), one(w))


def test_many_views_of_one_storage_are_compared_with_their_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[Any] = []

    def counted(one: Tensor, other: Tensor) -> Shares:
        compared.append((one, other))
        return shares(one, other)

    monkeypatch.setattr(policies, "shares", counted)
    monkeypatch.setattr(tying, "shares", counted)
    views = torch.arange(3000.0).split(3)
    module = nn.Module()
    module.weights = nn.ParameterList([nn.Parameter(view) for view in views[:500]])
    for number, view in enumerate(views[500:]):
        module.register_buffer(f"buffer{number}", view)
    found = policies.find_places(module, policies.Policies())
    assert [place.name for place in found] == [f"buffer{number}" for number in range(500)]
    named = list(module.named_parameters())
    assert Ties().add(named) == named
    assert len(compared) <= 3 * len(views)
    with pytest.raises(ValueError, match=r"'weights.7' .* and 'more' .* share a part"):
        Ties().add([*named, ("more", nn.Parameter(views[7][1:]))])
