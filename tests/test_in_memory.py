"""That workers which are threads end together, and tell why."""

from __future__ import annotations

import in_memory
import pytest
import torch
from in_memory import InMemoryAllReduce, InMemoryGroup, Wire, run_threads


def sum_or_fail(wire: Wire, rank: int, failing: int, elements: int) -> float:
    """A worker fails ahead of the sum, or makes it fail by another number of elements."""
    group = InMemoryGroup(wire, rank)
    if rank == failing and not elements:
        raise ValueError("failed by itself")
    value = torch.ones(elements if rank == failing else 3)
    (work,) = InMemoryAllReduce(group).sum([value])
    group.wait(work, "the sum")
    return float(value[0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize(
    ("elements", "error", "said"),
    [(0, ValueError, "failed by itself"), (2, RuntimeError, "must match the size")],
)
def test_the_first_error_is_raised_and_ends_the_wait_of_the_others(
    failing: int,
    elements: int,
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_memory, "TIMEOUT", 3600.0)
    with pytest.raises(error, match=said):
        run_threads(sum_or_fail, failing, elements, workers=3)


def test_without_an_error_each_worker_has_its_result() -> None:
    assert run_threads(sum_or_fail, -1, 0, workers=3) == [3.0] * 3
