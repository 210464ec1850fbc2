"""No trajectory changes by a bit, whatever is moved; see trajectories.py."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_memory import run_threads
from processes import run_workers
from trajectories import GOLDEN, Case, cases, run, run_in_memory

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")

WRITTEN: dict[str, Any] = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def by_workers(workers: int) -> list[dict[str, Any]]:
        folder: Path = tmp_path_factory.mktemp("saved")
        chosen = partial(by_processes, workers)
        return run_workers(run, workers, folder, chosen, workers=workers, timeout=170)

    return by_workers


def by_processes(workers: int, case: Case) -> bool:
    """Whether processes train it: as two all cases, as four what four threads cannot."""
    return workers == 2 or not case.in_memory


@pytest.mark.parametrize(
    ("workers", "name"),
    [(p, n) for p in (2, 4) for n, case in cases(p).items() if by_processes(p, case)],
)
def test_the_trajectory_is_the_one_that_was_written(trained: Any, workers: int, name: str) -> None:
    require_written(workers, name, [each[name] for each in trained(workers)])


@pytest.mark.parametrize("name", [n for n, case in cases(4).items() if case.in_memory])
def test_it_is_the_same_where_workers_exchange_by_memory(name: str) -> None:
    runs = run_threads(run_in_memory, cases(4)[name], workers=4)
    require_written(4, name, runs)


def require_written(workers: int, name: str, runs: list[Any]) -> None:
    """Those of the first worker and of the last are."""
    found = [runs[0], runs[-1]]
    written = WRITTEN[f"{workers} workers: {name}"]
    if cases(workers)[name].exact:
        assert found == written
    else:
        for mine, golden in zip(found, written, strict=True):
            np.testing.assert_allclose(mine, golden, rtol=0, atol=1e-12)


def test_every_trajectory_that_was_written_is_tested() -> None:
    assert set(WRITTEN) == {f"{p} workers: {name}" for p in (2, 4) for name in cases(p)}


def test_overlap_changes_no_bit() -> None:
    for name, behind in WRITTEN.items():
        if name.endswith(", behind"):
            assert behind == WRITTEN[name.replace(", behind", ", awaited")], name
