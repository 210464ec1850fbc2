"""Nothing that a worker did is lost under DelayedSGD: gradients are given, so all is known before.

A step of plain SGD goes -η g, wherever the worker is. So the center ends where the mean of all
steps of all workers takes it, however often they exchanged and whatever was late.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_memory import Wire, make_worker, run_threads
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from toy import trainer
from trajectories import STEPS, Case, Given, Steps, run_in_memory

from lightning_easgd import EASGD, DelayedSGD, EASGDStrategy, Often, TopK

START = np.array([0.5, -1.0, 0.25])


def went(rank: int, steps: range) -> np.ndarray:
    """How far a worker goes in these steps."""
    given = [[((7 * rank + 5 * t + 3 * i) % 16 - 8) / 8 for i in range(3)] for t in steps]
    return -0.125 * np.sum(given, axis=0) if given else np.zeros(3)


def expected(*counts: int) -> np.ndarray:
    """Where the center ends if workers took so many steps."""
    return START + np.mean([went(rank, range(n)) for rank, n in enumerate(counts)], axis=0)


EXCHANGES: list[dict[str, Any]] = [
    {"tau": 1},
    {"tau": 3},
    {"tau": 4, "fragments": 2},
    {"tau": 4, "often": Often(tau=2, below=2)},
]


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("options", EXCHANGES, ids=str)
@pytest.mark.parametrize("own", [0.25, 0.5, 1])
def test_the_center_gets_all_that_workers_did(own: float, options: Any, missing: int) -> None:
    case = Case({"algorithm": DelayedSGD(own), **options}, missing=missing)
    runs = run_threads(run_in_memory, case, workers=4)
    for run in runs:
        np.testing.assert_allclose(run[-1], expected(10, 10, 10, 10 - missing), rtol=0, atol=1e-14)


WAYS: dict[str, dict[str, Any]] = {
    "int8": {"compression": "int8"},
    "bf16": {"compression": "bf16"},
    "topk": {"compression": TopK(0.4)},
    "int8 in fragments": {"compression": "int8", "fragments": 2},
    "host memory": {"center_device": "cpu"},
    "not at the end": {"final_exchange": False},
}


class Thawing(Given):
    """Its bias is trained from the third step on."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, momentum=0)
        self.b.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.b.requires_grad_(batch_idx > 1)


def fit(module: Given, options: dict[str, Any], steps: int = STEPS, **how: Any) -> list[float]:
    ckpt_path = how.pop("ckpt_path", None)
    strategy = EASGDStrategy(**{"algorithm": "delayed_sgd", "tau": 2} | options)
    trainer(2, strategy, **how).fit(module, Steps(steps), ckpt_path=ckpt_path)
    return module.values()


def ways(rank: int) -> dict[str, list[float]]:
    found = {name: fit(Given(rank, 0), options) for name, options in WAYS.items()}
    found["thawing"] = fit(Thawing(rank), {"tau": 3})
    fit(module := Given(rank, 0), {}, 4)
    return found | {"again": fit(module, {})}


def test_nor_does_anything_get_lost_by_codecs_or_elsewhere() -> None:
    all_of_it = expected(10, 10)
    thawed = all_of_it - [0, 0, np.mean([went(rank, range(2))[2] for rank in (0, 1)])]
    again = all_of_it + expected(4, 4) - START
    for found in run_workers(ways, workers=2, timeout=100):
        # Of the last exchange at step 8, which is never awaited by another, all is there; of the
        # steps since then nothing is.
        np.testing.assert_allclose(found.pop("not at the end"), expected(8, 8), rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.pop("thawing"), thawed, rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.pop("again"), again, rtol=0, atol=1e-14)
        for name, values in found.items():
            np.testing.assert_allclose(values, all_of_it, rtol=0, atol=1e-7, err_msg=name)


def rounded(rank: int) -> dict[str, list[list[float]]]:
    """In full precision, and in 8 bits behind training and awaited."""
    codecs = [{}, {"compression": "int8"}, {"compression": "int8", "overlap": False}]
    rules = {"ahead": {"algorithm": EASGD(pull=0.5, look_ahead=1)}, "delayed": {}}
    return {
        name: [fit(Given(rank, 0), options | codec) for codec in codecs]
        for name, options in rules.items()
    }


@pytest.mark.parametrize("name", ["ahead", "delayed"])
def test_a_codec_changes_little_and_overlap_nothing(name: str) -> None:
    runs = [found[name] for found in run_workers(rounded, workers=2, timeout=100)]
    for exact, behind, awaited in runs:
        assert behind == awaited == runs[0][1]
        np.testing.assert_allclose(behind, exact, rtol=0, atol=0.01)


def losing(rank: int, folder: Path) -> list[float]:
    """Save at step 5, lose the file of worker 1, and go on."""
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=5, enable_version_counter=False)
    how = {"enable_checkpointing": True, "callbacks": [saving]}
    fit(Given(rank, 0), {"tau": 3}, max_steps=5, **how)
    if rank == 1:
        (mine,) = folder.glob("*/*-1.ckpt")
        mine.unlink()
    return fit(Given(rank, 0), {"tau": 3}, ckpt_path=folder / "last.ckpt", **how)


@pytest.mark.filterwarnings("ignore:Worker 1 starts at the center", "ignore:Checkpoint directory")
def test_a_worker_without_a_file_of_its_own_begins_at_the_center(tmp_path: Path) -> None:
    """What it did since its latest exchange, at step 3, was in its file."""
    lost = went(1, range(3, 5)) / 2
    for values in run_workers(losing, tmp_path, workers=2, timeout=60):
        np.testing.assert_allclose(values, expected(10, 10) - lost, rtol=0, atol=1e-14)


def swinging(wire: Wire, rank: int, own: float) -> list[float]:
    """The distances from the optimum, after each exchange, of a worker whose steps take it there.

    The first of two steps begins before the pull, and so only the second does.
    """
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(module.weight, 1.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    strategy = EASGDStrategy(algorithm=DelayedSGD(), tau=2)
    strategy.options.rules.algorithm.own = own
    worker = make_worker(wire, rank, module, strategy, steps=120)
    seen = []
    for _ in range(120):

        def closure() -> None:
            worker.exchange.before_batch()
            worker.optimizer.zero_grad()
            (0.5 * module.weight.square().sum()).backward()

        worker.step(closure)
        (fragment,) = worker.center.cohorts[0].fragments
        seen.append(abs(float(fragment.own_start().parts[0])))
    return seen[::2]


@pytest.mark.parametrize(("own", "radius"), [(0.25, 0.75**0.5), (0.5, 0.5**0.5), (0.0, 1.0)])
def test_how_fast_workers_settle_that_get_there_in_a_round(own: float, radius: float) -> None:
    """|z| = sqrt(1 - w), and 1 without a part of their own, which is refused."""
    for seen in run_threads(swinging, own, workers=2):
        assert (sum(seen[-12:]) / sum(seen[-24:-12])) ** (1 / 12) == pytest.approx(radius, rel=0.05)


@pytest.mark.parametrize("own", [0, -0.1, 1.1, True, "half"])
def test_own_parts_that_do_not_settle_are_refused(own: Any) -> None:
    with pytest.raises(ValueError, match=r"own=.* is not a part .*Allowed: a number in \(0, 1\]"):
        DelayedSGD(own)


def distance(wire: Wire, rank: int) -> tuple[float, float]:
    """Telemetry's consensus distance at the latest exchange, and what it should be."""
    module = Given(rank, 0)
    strategy = EASGDStrategy(algorithm="delayed_sgd", tau=1)
    worker = make_worker(wire, rank, module, strategy, steps=5)
    for t in range(5):
        worker.exchange.drain()
        (fragment,) = worker.center.cohorts[0].fragments
        center, before = fragment.center.parts[0].clone(), torch.tensor(module.values())
        worker.step(lambda t=t: module.training_step(torch.tensor(t), t).backward())
    far = torch.linalg.vector_norm(before - center) / torch.linalg.vector_norm(center)
    return strategy.telemetry.consensus_distance, float(far)


def test_telemetry_has_the_distance_from_the_center() -> None:
    for found, far in run_threads(distance, workers=2):
        assert found == pytest.approx(far, rel=1e-6)
