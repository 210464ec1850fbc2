"""What a LightningModule may be made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from spring import Validated, assert_like_on_a_spring, state, training
from staying import run_workers
from torch import Tensor, nn
from toy import loader, trainer

from lightning_easgd import EASGDStrategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


class Net(pl.LightningModule):
    """Fits the toy's targets by any function of the toy's inputs."""

    def __init__(self, net: Callable[[], nn.Module], make: Any = SGD) -> None:
        super().__init__()
        self.net, self.make_optimizer = net(), make

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).abs().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Complex(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.w.dtype) @ self.w


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.again, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.again.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x) * self.again(x))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x > 0).long() @ torch.tensor([1, 2, 4]))


class Image(nn.Module):
    """Convolutions whose weights are laid out channels last, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.convolve(x[:, :, None, None].expand(-1, -1, 2, 2)).flatten(1)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "net",
    [
        partial(nn.Linear, 3, 2, dtype=torch.float64),
        partial(Complex, torch.complex64),
        partial(Complex, torch.complex128),
        Tied,
        Image,
        Frozen,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    ],
    ids=["fp64", "complex64", "complex128", "tied", "channels last", "frozen", "weight norm"],
)
def test_modules(net: Any) -> None:
    assert_like_on_a_spring(training(partial(Net, net)))


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, lr=0.5), partial(torch.optim.SparseAdam, lr=0.1)]
)
def test_sparse_gradients(make: Any) -> None:
    assert_like_on_a_spring(training(partial(Net, Sparse, make)))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision: str) -> None:
    module = partial(Net, partial(nn.Linear, 3, 2))
    assert_like_on_a_spring(training(module, precision=precision))


class Late(Net):
    """Its layers are made by ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = nn.Linear(3, 2)


def test_a_module_that_is_made_by_configure_model() -> None:
    def scenario(make_trainer: Any) -> Any:
        module = Late()
        make_trainer().fit(module, loader(0, 8, torch.float32))
        return state(module)

    assert assert_like_on_a_spring(scenario).keys() == {"net.weight", "net.bias"}


class Lazy(Net):
    """Knows the number of its inputs when it has seen some."""

    def __init__(self, dry_run: bool) -> None:
        layers = nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2)
        super().__init__(partial(nn.Sequential, *layers))
        self.dry_run = dry_run

    def configure_model(self) -> None:
        if self.dry_run:
            self.net(torch.zeros(2, 3))


def fit_lazy(rank: int, dry_run: bool) -> Any:
    module = Lazy(dry_run)
    trainer(2, EASGDStrategy(tau=3)).fit(module, loader(rank, 8, torch.float32))
    return state(module)


def test_a_lazy_module_that_has_seen_an_input() -> None:
    one, two = run_workers(fit_lazy, True, workers=2)
    assert one["net.0.weight"].shape == (4, 3)
    for key in one.keys() - {"net.1.num_batches_tracked"}:
        assert (one[key] == two[key]).all()


def test_a_lazy_module_that_has_not_is_refused() -> None:
    for outcome in run_workers(fit_lazy, False, workers=2, check=False):
        assert outcome.error == "MisconfigurationException"
        assert "net.0.weight" in outcome.message
        assert "configure_model" in outcome.message


def fit_normalized(rank: int, convert: Any) -> None:
    layers = partial(nn.Sequential, nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module = convert(Net(layers))
    trainer(2, EASGDStrategy(tau=3)).fit(module, loader(rank, 8, torch.float32))


def test_a_module_that_was_converted_to_synchronized_statistics_is_refused() -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for outcome in run_workers(fit_normalized, convert, workers=2, check=False):
        assert outcome.error == "MisconfigurationException"
        assert "['net.1']" in outcome.message
        assert "TorchSyncBatchNorm().revert(module)" in outcome.message
    run_workers(fit_normalized, lambda m: TorchSyncBatchNorm().revert(convert(m)), workers=2)


class BuffersOnly(Validated):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.register_buffer("mean", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.mean += batch[1].mean()

    def configure_optimizers(self) -> None:
        pass


def fit_buffers(rank: int) -> None:
    trainer(2, EASGDStrategy()).fit(BuffersOnly(), loader(rank, 3))


def test_a_module_without_parameters_is_refused() -> None:
    for outcome in run_workers(fit_buffers, workers=2, check=False):
        assert outcome.error == "ValueError"
        assert "BuffersOnly has no parameter with requires_grad=True" in outcome.message


def fit_compiled(rank: int, what: str) -> Any:
    # While one thread runs: after a fork torch makes its pool anew, and ends the process where two
    # threads of a backward pass come to do so at once.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, strategy = Net(Tied), EASGDStrategy(tau=3)
    fitted: Any = module
    if what == "module":
        fitted = torch.compile(module, backend="aot_eager")
    else:
        module.net.compile(backend="aot_eager")

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        # From before the first exchange on, whatever needs another graph is an error.
        torch.compiler.set_stance("fail_on_recompile" if batch_idx >= 2 else "default")

    module.on_train_batch_start = on_train_batch_start
    trainer(2, strategy).fit(fitted, loader(rank, 12, torch.float32))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return state(module), graphs, strategy.telemetry.exchanges


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("what", ["module", "part"])
def test_a_compiled_module_is_not_compiled_again_by_an_exchange(what: str) -> None:
    results = run_workers(fit_compiled, what, workers=2)
    for final, graphs, exchanges in results:
        assert graphs >= 1
        assert exchanges == 4
        assert all((final[key] == results[0][0][key]).all() for key in final)
