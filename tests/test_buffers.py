"""Buffers of the center: constants, means, what has none, and what changes its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from staying import run_workers
from torch import Tensor, nn
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.flat import Memory
from lightning_easgd.center.statistics import Statistics

SGD = partial(torch.optim.SGD, lr=0.1)
CPU = Memory(torch.device("cpu"))
AVERAGE = {"*": "average"}
"""Chosen, so that nothing is said."""


def workers_of(
    count: int, make: Callable[[], nn.Module], policy: Any = AVERAGE
) -> list[tuple[nn.Module, Statistics]]:
    """Modules and their statistics, in one process."""
    modules = [make() for _ in range(count)]
    return [(module, Statistics(module, policy, r, CPU)) for r, module in enumerate(modules)]


def exchange(workers: Any, healthy: list[bool] | None = None) -> None:
    """What an exchange does, with the sum taken by hand."""
    healthy = healthy or [True] * len(workers)
    told = zip(workers, healthy, strict=True)
    brought = [statistics.contribute(well) for (_, statistics), well in told]
    sums = [torch.stack(parts).sum(0) for parts in zip(*brought, strict=True)]
    for _, statistics in workers:
        for part, total in zip(statistics.total.parts, sums, strict=True):
            part.copy_(total)
        statistics.apply(healthy)


def centers(workers: Any) -> list[Tensor]:
    """Of every worker's only buffer, as the module would show it."""
    found = []
    for module, statistics in workers:
        own = module.value.clone()
        statistics.load_center()
        found.append(module.value.clone())
        module.value.copy_(own)
    return found


def holding(values: Any, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Module()
        module.register_buffer("value", torch.tensor(values, dtype=dtype))
        return module

    return make


def bit_pattern(tensor: Tensor) -> bytes:
    if tensor.dtype is torch.bfloat16:  # torch's conversion to it knows one NaN only
        tensor = tensor.nan_to_num(1.5, math.inf, -math.inf)
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_a_constant_keeps_its_bits(count: int, dtype: torch.dtype) -> None:
    about = torch.finfo(dtype)
    smallest = about.smallest_normal * about.eps
    values = [0.0, -0.0, 1 / 3, math.inf, -math.inf, math.nan, about.min, about.max, smallest, -2.5]
    workers = workers_of(count, holding(values, dtype))
    expected = bit_pattern(workers[0][0].value)
    for healthy in [True] * count, [True] + [False] * (count - 1):
        for _ in range(5):
            exchange(workers, list(healthy))
            assert all(bit_pattern(center) == expected for center in centers(workers))
            assert all(bit_pattern(module.value) == expected for module, _ in workers)


@pytest.mark.parametrize("start", [0.0, 1e4, -3e38, math.inf, math.nan])
@pytest.mark.parametrize("sick", [None, 1])
def test_what_changed_is_averaged_wherever_the_center_was(start: float, sick: int | None) -> None:
    """A variance that falls from 1e4 to nothing never becomes negative."""
    workers = workers_of(3, holding([start] * 4))
    own = torch.tensor([[1e-9, 0.0, 3e38, 5.0], [3e-9, 0.0, 2e38, 5.0], [5e-9, 0.0, 3e38, 5.0]])
    for rank, (module, _) in enumerate(workers):
        module.value.copy_(own[rank])
    exchange(workers, [rank != sick for rank in range(3)])
    known = [rank for rank in range(3) if rank != sick]
    mean = own[known].double().mean(0)
    for center in centers(workers):
        scale = max(abs(start), 1e-9) if math.isfinite(start) else 1e-9
        torch.testing.assert_close(center.double(), mean, rtol=1e-6, atol=1e-15 * scale)
        assert torch.equal(center, centers(workers)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_all_workers_set_alike_is_taken_over(dtype: torch.dtype) -> None:
    """As a mask that the first forward fills: infinities too."""
    workers = workers_of(3, holding([0.0, 1.0, 2.0, 3.0], dtype))
    about = torch.finfo(torch.float32)
    mask = torch.tensor([-math.inf, math.inf, about.min, 0.0], dtype=dtype)
    for module, _ in workers:
        module.value.copy_(mask)
    exchange(workers)
    assert all(torch.equal(center, mask) for center in centers(workers))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_one_worker_alone_has_that_is_not_finite_spoils_nothing(bad: float) -> None:
    workers = workers_of(3, holding([1.0, 2.0]))
    for rank, (module, _) in enumerate(workers):
        module.value.copy_(torch.tensor([bad if rank == 1 else 7.0, 3.0 * rank]))
    exchange(workers)
    for center in centers(workers):
        assert center.tolist() == [1.0, 3.0]
    assert str(workers[1][0].value[0].item()) == str(bad)  # its own, and nobody mends it


def test_a_normalisation_that_overflows_starts_again_from_the_center() -> None:
    workers = workers_of(2, lambda: nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    with torch.no_grad():
        for rank, (module, _) in enumerate(workers):
            module[0].running_mean.fill_(1.0 + rank)
            module[1].running_mean.fill_(1.0 + rank)
        workers[1][0][0].running_var[1] = math.inf
    exchange(workers)
    first, second = workers[1][0]
    assert (first.running_mean.tolist(), first.running_var.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert second.running_mean.tolist() == [2.0, 2.0]  # the other's are its own
    for module, statistics in workers:
        statistics.load_center()
        assert module[0].running_mean.tolist() == [0.5, 0.5]
        assert module[0].running_var.tolist() == [1.0, 1.0]
        assert module[1].running_mean.tolist() == [1.5, 1.5]


def test_a_center_that_is_not_finite_mends_nobody() -> None:
    workers = workers_of(2, lambda: nn.BatchNorm1d(2))
    for module, statistics in workers:
        statistics.center.parts[0].fill_(math.inf)
        module.running_mean.fill_(3.0)
    exchange(workers)
    for module, statistics in workers:
        assert module.running_mean.tolist() == [3.0, 3.0]
        statistics.load_center()
        assert module.running_mean.tolist() == [3.0, 3.0]
        assert module.running_var.tolist() == [1.0, 1.0]


def test_an_expanded_buffer_has_the_mean_of_its_memory() -> None:
    def make() -> nn.Module:
        module = nn.Module()
        module.register_buffer("value", torch.zeros(1, 4).expand(8, 4))
        return module

    workers = workers_of(3, make)
    for rank, (module, _) in enumerate(workers):
        module.value[0].fill_(rank)
    exchange(workers)
    for module, statistics in workers:
        assert statistics.total.parts[0].numel() == 4
        statistics.load_center()
        assert torch.equal(module.value, torch.ones(8, 4))


class Caching(Toy):
    """Assigns to its buffers while it trains, on some of the workers."""

    def __init__(self, change: str, ranks: tuple[int, ...]) -> None:
        super().__init__(SGD, dtype=torch.float32)
        self.register_buffer("cache", torch.ones(2))
        self.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min))
        self.change, self.ranks = change, ranks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.global_rank in self.ranks:
            now = {"none": None, "resize": torch.ones(3), "replace": self.cache * 2}
            self.cache = now[self.change]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.mask.tolist() == [torch.finfo(torch.float32).min] * 2


def train_caching(rank: int, change: str, ranks: tuple[int, ...], overlap: bool) -> Any:
    module = Caching(change, ranks)
    strategy = EASGDStrategy(tau=2, overlap=overlap, buffers=AVERAGE)
    fitting = trainer(3, strategy, val_check_interval=2)
    fitting.fit(module, loader(rank, 8, torch.float32), loader(rank, 1, torch.float32))
    return None if module.cache is None else module.cache.tolist(), module.mask.tolist()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_buffer_that_is_replaced_is_followed(overlap: bool) -> None:
    for cache, mask in run_workers(train_caching, "replace", (0, 1), overlap, workers=3):
        assert cache == [pytest.approx(5 / 3)] * 2
        assert mask == [torch.finfo(torch.float32).min] * 2


@pytest.mark.filterwarnings("ignore:Buffer 'cache' had shape")
@pytest.mark.parametrize(("change", "now"), [("none", None), ("resize", [1.0] * 3)])
@pytest.mark.parametrize("ranks", [(0, 1, 2), (1,)])
def test_a_buffer_that_is_dropped_or_resized_is_the_workers_own(
    change: str, now: Any, ranks: tuple[int, ...]
) -> None:
    for rank, (cache, mask) in enumerate(
        run_workers(train_caching, change, ranks, True, workers=3)
    ):
        assert cache == (now if rank in ranks else [1.0, 1.0])
        assert mask == [torch.finfo(torch.float32).min] * 2


def test_a_buffer_that_changes_its_shape_is_said_by_name_once() -> None:
    ((module, statistics),) = workers_of(1, holding([1.0, 2.0]))
    module.value = torch.ones(3)
    with pytest.warns(
        UserWarning, match=r"'value' had shape \(2,\).*is \(3,\).* now.*EASGDStrategy"
    ):
        exchange([(module, statistics)])
    exchange([(module, statistics)])
    module.value = torch.tensor([5.0, 7.0])
    exchange([(module, statistics)])
    assert centers([(module, statistics)])[0].tolist() == [5.0, 7.0]
