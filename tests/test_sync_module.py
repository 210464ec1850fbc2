"""That workers begin equal, whatever their modules hold, and send each other only what differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from staying import run_in_turn, run_workers
from torch import Tensor
from toy import Toy, loader, trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.digest import fingerprint
from lightning_easgd.center.storage import components, overlaps_itself

SGD = partial(torch.optim.SGD, lr=0.1)


def digest(tensor: Tensor) -> str:
    return fingerprint(components(tensor.detach()))[1]


class Holder(Toy):
    """Has a buffer, or something else, that depends on the worker's number or not."""

    def __init__(self, make: Callable[[int], Any], rank: int, persistent: bool = True) -> None:
        super().__init__(SGD, dtype=torch.float32)
        self.register_buffer("held", make(rank), persistent=persistent)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def fit(
    rank: int, make: Callable[[int], Any], persistent: bool, overlap: bool, workers: int = 3
) -> tuple[str | None, int]:
    """The digest of what is held in the end, and how much was sent at set-up."""
    module, sizes = Holder(make, rank, persistent), []
    broadcast = dist.broadcast

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    module.on_train_start = lambda: seen.append(sum(sizes))
    seen: list[int] = []
    fitting = trainer(workers, EASGDStrategy(tau=2, overlap=overlap), val_check_interval=2)
    with mock.patch.object(dist, "broadcast", recorded):
        fitting.fit(module, loader(rank, 4, torch.float32), loader(rank, 1, torch.float32))
    return None if module.held is None else digest(module.held), seen[0]


def csr(rank: int) -> Tensor:
    return torch.eye(3).to_sparse_csr()


KINDS: dict[str, Callable[[int], Any]] = {
    "None": lambda rank: None,
    "no elements": lambda rank: torch.zeros(0, 4),
    "COO": lambda rank: torch.eye(3).to_sparse(),
    "COO that is not coalesced": lambda rank: torch.sparse_coo_tensor(
        [[0, 0, 1]], [1.0, 2.0, 3.0], (2,), check_invariants=True
    ),
    "CSR": csr,
    "CSC": lambda rank: torch.eye(3).to_sparse_csc(),
    "BSR": lambda rank: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda rank: torch.quantize_per_tensor(torch.ones(3), 0.1, 3, torch.qint8),
    "per channel": lambda rank: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8
    ),
    "expanded": lambda rank: torch.ones(1, 4).expand(8, 4),
    "expanded number": lambda rank: torch.tensor(2).expand(3, 3),
    "windows": lambda rank: torch.arange(6.0).unfold(0, 3, 1),
    "transposed": lambda rank: torch.arange(6.0).view(2, 3).t(),
    "conjugate": lambda rank: torch.tensor([1 + 2j, 3.0]).conj(),
    "bool": lambda rank: torch.tensor([True, False]),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_(tensor|channel).*")
@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_any_kind_that_is_equal_is_not_sent_and_stays(kind: str) -> None:
    before = KINDS[kind](0)
    cases = [(KINDS[kind], persistent, kind != "COO", 2) for persistent in (True, False)]
    for after, sent in chain(*run_in_turn(fit, cases, workers=2)):
        assert sent == 0
        assert after == (None if before is None else digest(before))


DIFFERING: dict[str, Callable[[int], Any]] = {
    "dense": lambda rank: torch.full((8, 4), 1 + rank),
    "expanded": lambda rank: torch.full((1, 4), 1 + rank).expand(8, 4),
    "transposed": lambda rank: torch.full((4, 8), 1 + rank).t(),
    "bool": lambda rank: torch.full((4,), rank == 0),
}


@pytest.mark.parametrize("kind", DIFFERING)
def test_only_what_differs_is_sent_and_worker_0s_counts(kind: str) -> None:
    expected = DIFFERING[kind](0)
    size = {"expanded": 4 * 8}.get(kind, expected.nbytes)
    for after, sent in run_workers(fit, DIFFERING[kind], False, True, workers=3):
        assert sent == size
        assert after == digest(expected)


REFUSED: dict[str, Callable[[int], Any]] = {
    "sparse_coo": lambda rank: (torch.eye(3) * (1 + rank)).to_sparse(),
    "strided": lambda rank: (torch.arange(6.0) + rank).unfold(0, 3, 1),
    "quantized": lambda rank: torch.quantize_per_tensor(torch.ones(3), 0.1, rank, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_differs_and_cannot_be_sent_is_named_on_all(kind: str) -> None:
    for outcome in run_workers(fit, REFUSED[kind], False, True, workers=3, check=False):
        assert outcome.error == "ValueError"
        assert "different values of buffer 'held'" in outcome.message
        assert kind in outcome.message
        assert "on every worker" in outcome.message


def test_one_that_only_one_worker_expands_is_named_on_all() -> None:
    def make(rank: int) -> Tensor:
        return torch.ones(1, 4).expand(8, 4) if rank == 1 else torch.ones(8, 4)

    for outcome in run_workers(fit, make, False, True, workers=3, check=False):
        assert outcome.error == "ValueError"
        assert "buffer held (8, 4) torch.float32 expanded from (1, 4)" in outcome.message


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        (torch.zeros(2, 3), False),
        (torch.zeros(2, 3).t(), False),
        (torch.zeros(4, 4)[::2, 1::2], False),
        (torch.zeros(9).as_strided((3, 2), (2, 3)), False),
        (torch.zeros(9).as_strided((3, 3), (2, 2)), True),
        (torch.zeros(1, 3).expand(2, 3), True),
        (torch.zeros(9).unfold(0, 3, 1), True),
        (torch.zeros(0, 3), False),
        (torch.tensor(1.0), False),
    ],
)
def test_what_overlaps_itself(tensor: Tensor, overlaps: bool) -> None:
    assert overlaps_itself(tensor) == overlaps
