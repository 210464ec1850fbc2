"""Groups within groups, with centers of their own: how they end and go on, and what is refused."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import middles
from interrupted import kill_one, stop_and_go_on
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ADAMW, Noisy
from processes import run_workers
from toy import Resumable, Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy, Groups
from lightning_easgd.groups import arrange_levels

SGD = partial(torch.optim.SGD, lr=0.1)
WORKERS = 6
OUTER = [[0, 1, 2, 5], [3, 4]]
INNER = [[0, 5], [1, 2], [3], [4]]
NEST = Groups(OUTER, tau=2, inside=Groups(INNER))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def resumed(rank: int, folder: Path, step: int | None, counts: list[int]) -> Any:
    """Saves after every 5 steps; before the exchange at step 9 a whole inner group is poisoned."""
    torch.manual_seed(rank)
    module, own, levels = Noisy(ADAMW), {}, []

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank in (0, 5) and module.trainer.global_step == 9:
            module.w.data[0, 0] = float("nan")

    def on_train_epoch_end() -> None:
        own.update(bits(weights(module)))
        levels[:] = map(bits, middles(strategy))

    module.on_train_batch_end = on_train_batch_end
    module.on_train_epoch_end = on_train_epoch_end
    even = len(set(counts)) == 1
    every = {"every_n_train_steps": 5} if even else {"every_n_epochs": 1}
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, **every)
    strategy = EASGDStrategy(tau=4, groups=NEST)
    options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
    fitting = trainer(WORKERS, strategy, **options)
    saved = step and folder / f"step={step}.ckpt"
    fitting.fit(module, Resumable(rank, counts[rank]), ckpt_path=saved)
    counters = strategy.telemetry.counters()
    counters.pop("wait_seconds")
    # Where workers wait for each other at the end of an epoch, they do so again when resuming.
    return bits(weights(module)), own, levels, counters if even else counters["non_finite"]


def resumed_everywhere(rank: int, folder: Path) -> Any:
    """From steps before an exchange of one level, two, or all; and where groups stood still."""
    warnings.filterwarnings("ignore", "At step")
    even, uneven = [9] * WORKERS, [11, 10, 9, 11, 6, 7]
    runs = [resumed(rank, folder / "even", step, even) for step in (None, 5, 10, 20)]
    return runs, [resumed(rank, folder / "uneven", step, uneven) for step in (None, 11, 22)]


def test_resuming_goes_on_bit_for_bit_at_every_level(tmp_path: Path) -> None:
    for runs in run_workers(resumed_everywhere, tmp_path, workers=WORKERS, timeout=120):
        for straight, *others in runs:
            assert all(other == straight for other in others)


def begun(rank: int, folder: Path, groups: Any) -> Any:
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
        trainer(WORKERS, strategy, max_epochs=2).fit(
            module, Resumable(rank, 9), ckpt_path=folder / "step=10.ckpt"
        )
    return [w for w in warned if "at the center" in w], found


def regrouped(rank: int, folder: Path) -> Any:
    warnings.filterwarnings("ignore", "At step")
    resumed(rank, folder, None, [9] * WORKERS)
    two = Groups(OUTER, tau=2)
    other = Groups(OUTER, tau=2, inside=Groups([[0, 1], [2, 5], [3, 4]]))
    found = [begun(rank, folder, groups) for groups in (NEST, two, other)]
    for lost in (5, 3, 4):
        if rank == lost:
            (file,) = folder.glob(f"step=10.ckpt.workers/*-{rank}.ckpt")
            file.unlink()
    return [*found, begun(rank, folder, NEST)]


def test_groups_that_cannot_go_on_start_at_the_center_above(tmp_path: Path) -> None:
    runs = run_workers(regrouped, tmp_path, workers=WORKERS, timeout=120)
    before, two, other, lost = zip(*runs, strict=True)
    assert before[0][0] == []
    for changed in (two, other):
        assert len(changed[0][0]) == WORKERS
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


@pytest.mark.parametrize(
    "counts", [[40] * WORKERS, [40, 3, 3, 3, 40, 40]], ids=["all train", "groups stand still"]
)
def test_a_member_of_an_inner_group_that_is_killed_is_named_to_all_workers(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = Groups(OUTER, tau=4, inside=Groups(INNER, tau=2))
    kill_one(monkeypatch, {"tau": 16, "groups": groups}, counts, who=5, at=7)


def test_a_signal_to_one_that_stands_still_stops_all_and_they_go_on_bit_for_bit(
    tmp_path: Path,
) -> None:
    counts = [22, 5, 5, 9, 22, 20]
    taken, _ = stop_and_go_on(tmp_path, {"tau": 4, "groups": NEST}, counts, who=2)
    assert taken in {9, 13, 17}


def refused(rank: int) -> None:
    unstable = Groups([[0, 1, 2], [3, 4, 5]], beta=1.1, inside=Groups([[0, 1, 2], [3, 4], [5]]))
    with pytest.raises(ValueError, match=r"Inside a group of 1 group\(s\), .*Set beta below 1"):
        trainer(WORKERS, EASGDStrategy(groups=unstable)).fit(Toy(SGD), loader(rank, 2))
    apart = Groups("node", inside=Groups(4))
    with pytest.raises(ValueError, match=r"groups=4 does not divide the 6 workers"):
        trainer(WORKERS, EASGDStrategy(groups=apart)).fit(Toy(SGD), loader(rank, 2))


def test_what_is_unstable_or_does_not_fit_is_refused_on_all_workers() -> None:
    run_workers(refused, workers=WORKERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inside": 2}, r"inside=2\) is not possible.*Give inside=Groups\(2, tau=...\), or None"),
        ({"tau": 3, "inside": Groups(2, tau=2)}, r"tau=3 is not a multiple of the tau=2 .*tau=4"),
        ({"inside": Groups(3)}, "groups=3 does not divide the 4 workers"),
        ({"inside": Groups(8)}, "groups=8 does not divide the 4 workers"),
        ({"rho": 0.1, "inside": Groups(2)}, "rho=0.1.* is not possible with groups inside"),
        (
            {"inside": Groups([[0, 1], [2, 4], [3, 5, 6, 7]])},
            r"group \[2, 4\] is not within .* in \[0, 1, 2, 3\] and \[4, 5, 6, 7\]\. Allowed",
        ),
        (
            {"members": [[0, 1, 2], [3, 4]], "inside": Groups([[0, 1], [2, 3], [4]])},
            r"group \[2, 3\] is not within .* in \[0, 1, 2\] and \[3, 4\]",
        ),
        (
            {"members": [[0, 1, 2], [3, 4]], "inside": Groups(2)},
            r"groups=2 does not divide the 3 workers \[0, 1, 2\] of a group",
        ),
        (
            {"members": [[0, 1], [2, 3]], "inside": Groups([[0, 1], [2]])},
            r"\[\[0, 1\], \[2\]\] does not hold every rank from 0 to 3 once",
        ),
    ],
)
def test_what_cannot_be_nested_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(**{"members": 4, **options})


def test_the_levels_must_have_periods_that_are_multiples_up_to_the_strategys() -> None:
    with pytest.raises(ValueError, match=r"tau=6 is not a multiple of the tau=4 inside groups"):
        EASGDStrategy(tau=6, groups=Groups(4, tau=4, inside=Groups(2, tau=2)))


@pytest.mark.parametrize(
    ("groups", "levels"),
    [
        (None, []),
        (2, [[[0, 1], [2, 3], [4, 5], [6, 7]]]),
        (
            Groups(4, inside=Groups(2)),
            [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]],
        ),
        (
            Groups("node", inside=Groups(2)),
            [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 2], [1, 3], [4, 6], [5, 7]]],
        ),
        (
            Groups([[3, 1, 0], [2, 4, 5, 6, 7]], inside=Groups("node")),
            [[[0, 1, 3], [2, 4, 5, 6, 7]], [[0], [1, 3], [2, 4, 6], [5, 7]]],
        ),
    ],
)
def test_a_number_and_node_part_every_group_by_itself(groups: Any, levels: Any) -> None:
    assert arrange_levels(groups, [0, 1] * 4) == levels


def test_lists_that_cross_machines_are_refused_when_these_are_known() -> None:
    groups = Groups("node", inside=Groups([[0, 2], [1, 3]]))
    assert arrange_levels(groups, [0, 1, 0, 1])[1] == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match=r"group \[0, 2\] is not within .* \[0, 1\] and \[2, 3\]"):
        arrange_levels(groups, [0, 0, 1, 1])
