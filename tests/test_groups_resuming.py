"""Trees of groups that go on from a checkpoint: bit for bit, or at the center above."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import middles
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ADAMW, Noisy
from staying import run_workers
from toy import Resumable, Toy, bits, trainer, weights

from lightning_easgd import EASGDStrategy, Groups

TREE = Groups([[0, 3], [1, 2]], tau=2)
OUTER = [[0, 1, 2, 5], [3, 4]]
NEST = Groups(OUTER, tau=2, inside=Groups([[0, 5], [1, 2], [3], [4]]))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Half(Noisy):
    """In bf16, which rounds what its centers hold."""

    def __init__(self, make: Any) -> None:
        super().__init__(make, dtype=torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step([part.bfloat16() for part in batch], batch_idx)


def resumed(
    rank: int,
    folder: Path,
    groups: Groups,
    counts: list[int],
    step: int | None,
    *,
    make: Any = Noisy,
    sick: tuple[int, ...] = (),
) -> Any:
    """Saves after every 5 steps; weights of sick workers are poisoned before the one at step 9."""
    torch.manual_seed(rank)
    module, own, levels = make(ADAMW), {}, []

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank in sick and module.trainer.global_step == 9:
            module.w.data[0, 0] = float("nan")

    def on_train_epoch_end() -> None:
        own.update(bits(weights(module)))
        levels[:] = map(bits, middles(strategy))

    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = on_train_epoch_end
    even = len(set(counts)) == 1
    every = {"every_n_train_steps": 5} if even else {"every_n_epochs": 1}
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, **every)
    strategy = EASGDStrategy(tau=4, groups=groups)
    options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(len(counts), strategy, **options)
    saved = step and folder / f"step={step}.ckpt"
    fitting.fit(module, Resumable(rank, counts[rank]), ckpt_path=saved)
    counters = strategy.telemetry.counters()
    counters.pop("wait_seconds")
    # Where workers wait for each other at the end of an epoch, they do so again when resuming.
    return bits(weights(module)), own, levels, counters if even else counters["non_finite"]


CASES: dict[str, Any] = {
    "tree": (TREE, [9] * 4, (None, 5, 10, 20), {}),
    "tree in bf16": (TREE, [9] * 4, (None, 10), {"make": Half}),
    "nest": (NEST, [9] * 6, (None, 5, 10, 20), {"sick": (0, 5)}),
    "nest with idle groups": (
        NEST,
        [11, 10, 9, 11, 6, 7],
        (None, 11, 22),
        {"sick": (0, 5)},
    ),
}
"""Groups, batches of each worker, and steps from which it goes on: before an exchange of one level,
two, all or none. A whole inner group is poisoned."""


def resumed_everywhere(rank: int, folder: Path, name: str) -> Any:
    warnings.filterwarnings("ignore", "At step")  # a poisoned worker's
    groups, counts, steps, how = CASES[name]
    return [resumed(rank, folder, groups, counts, step, **how) for step in steps]


@pytest.mark.parametrize("name", CASES)
def test_resuming_goes_on_bit_for_bit_at_every_level(name: str, tmp_path: Path) -> None:
    workers = len(CASES[name][1])
    for straight, *others in run_workers(
        resumed_everywhere, tmp_path, name, workers=workers, timeout=120
    ):
        assert all(other == straight for other in others)


def begun(rank: int, workers: int, folder: Path, groups: Any) -> Any:
    """Warnings, own weights and centers of the groups where training goes on after 10 steps."""
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: warned.append(str(message)))
        module, found = Toy(ADAMW), []
        strategy = EASGDStrategy(tau=4, groups=groups)

        def on_train_start() -> None:
            center = {key: value.numpy() for key, value in strategy.center_state_dict().items()}
            found.extend(map(bits, [center, *middles(strategy), weights(module)]))

        module.on_train_start = on_train_start
        trainer(workers, strategy, max_epochs=2).fit(
            module, Resumable(rank, 9), ckpt_path=folder / "step=10.ckpt"
        )
    return sorted(w for w in warned if "at the center" in w), found


def lose(rank: int, folder: Path, *ranks: int) -> None:
    """Remove the files of these workers."""
    if rank in ranks:
        (file,) = folder.glob(f"step=10.ckpt.workers/*-{rank}.ckpt")
        file.unlink()


def regrouped(rank: int, folder: Path) -> Any:
    resumed(rank, folder, TREE, [9] * 4, None)
    others = (TREE, 2, [[0, 3], [1, 2]], Groups(2, tau=2), None)
    found = [begun(rank, 4, folder, groups) for groups in others]
    lose(rank, folder, 3)
    return [*found, begun(rank, 4, folder, TREE)]


def test_groups_that_cannot_go_on_together_start_at_the_center(tmp_path: Path) -> None:
    runs = run_workers(regrouped, tmp_path, workers=4, timeout=120)
    for case, at_center in enumerate([[], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [], [0, 3]]):
        assert len(runs[0][case][0]) == len(at_center)
        own = [str(run[case][1][-1]) for run in runs]
        assert len(set(own)) == 4 - max(0, len(at_center) - 1)
        assert len({own[rank] for rank in at_center}) <= 1


def nested_otherwise(rank: int, folder: Path) -> Any:
    warnings.filterwarnings("ignore", "At step")
    resumed(rank, folder, NEST, [9] * 6, None, sick=(0, 5))
    two = Groups(OUTER, tau=2)
    other = Groups(OUTER, tau=2, inside=Groups([[0, 1], [2, 5], [3, 4]]))
    found = [begun(rank, 6, folder, groups) for groups in (NEST, two, other)]
    lose(rank, folder, 3, 4, 5)
    return [*found, begun(rank, 6, folder, NEST)]


def test_groups_that_cannot_go_on_start_at_the_center_above(tmp_path: Path) -> None:
    runs = run_workers(nested_otherwise, tmp_path, workers=6, timeout=120)
    before, two, other, lost = zip(*runs, strict=True)
    assert before[0][0] == []
    for changed in (two, other):
        assert len(changed[0][0]) == 6
        assert all(level == found[0] for _, found in changed for level in found)
    # Worker 5 has no file, so its mate 0 starts with it at the center that workers 1 and 2 brought.
    # Nobody brought that of workers 3 and 4, who start at the uppermost.
    assert len(lost[0][0]) == 4
    for rank in (1, 2):
        assert lost[rank][1] == before[rank][1]
    for rank in (0, 5):
        center, outer, inner, own = lost[rank][1]
        assert center == before[1][1][0]
        assert outer == inner == own == before[1][1][1] != center
    for rank in (3, 4):
        assert all(level == before[0][1][0] for level in lost[rank][1])
