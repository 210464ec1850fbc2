"""What lies on the host lies there also where ``torch.set_default_device`` names another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_easgd import DiLoCo, Int8, TopK
from lightning_easgd.center import digest
from lightning_easgd.center.spectral import leading_vectors
from lightning_easgd.center.storage import components, places
from lightning_easgd.checkpoint.random_state import random_state, restore_random_state
from lightning_easgd.communication import plain_data
from lightning_easgd.communication.codecs import waiting_time

HOST = torch.device("cpu")
MATRIX = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    digest._weights.cache_clear()
    torch.set_default_device("meta")  # whose tensors have no values to compute with
    yield
    torch.set_default_device(None)
    digest._weights.cache_clear()


def quantized() -> Any:
    return torch.quantize_per_tensor(MATRIX, 0.5, 1, torch.quint8)


CASES: dict[str, Callable[[], Any]] = {
    "singular vectors": lambda: [v.tolist() for v in leading_vectors(MATRIX)],
    "codecs": lambda: [waiting_time(codec, HOST) for codec in (Int8(), TopK(0.1))],
    "checksums": lambda: digest._checksum(MATRIX).item(),
    "places": lambda: places(MATRIX.T).tolist(),
    "bytes": lambda: b"".join(map(bytes, digest._byte_chunks(MATRIX))),
    "parts": lambda: [part.tolist() for part in components(quantized())],
    "plain data": lambda: plain_data.gather({"a": 1}, lambda tensor: [tensor.clone()]),
    "random state": lambda: restore_random_state(random_state()),
    "rules": lambda: repr(DiLoCo(0.7)),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_on_the_host_is_the_same(
    name: str, request: pytest.FixtureRequest
) -> None:
    expected = CASES[name]()
    request.getfixturevalue("elsewhere")
    assert CASES[name]() == expected
