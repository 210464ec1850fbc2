"""Groups with centers of their own: how they end and go on, and what is refused."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import kill_one, stop_alone, stop_and_go_on
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ADAMW, Noisy
from processes import run_workers
from toy import Resumable, Toy, bits, loader, trainer, weights

from lightning_easgd import Cosine, EASGDStrategy, Groups, NonFiniteError

SGD = partial(torch.optim.SGD, lr=0.1)
TREE = {"tau": 4, "groups": Groups([[0, 3], [1, 2]], tau=2)}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Half(Noisy):
    """In bf16, which rounds what its centers hold."""

    def __init__(self) -> None:
        super().__init__(ADAMW, dtype=torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step([part.bfloat16() for part in batch], batch_idx)


def resumed(rank: int, folder: Path, step: int | None, half: bool = False) -> Any:
    torch.manual_seed(rank)
    module, own = Half() if half else Noisy(ADAMW), {}
    module.on_train_epoch_end = lambda: own.update(bits(weights(module)))
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    strategy = EASGDStrategy(**TREE)
    fitting = trainer(4, strategy, max_epochs=3, enable_checkpointing=True, callbacks=[saving])
    saved = step and folder / f"step={step}.ckpt"
    fitting.fit(module, Resumable(rank, 9), ckpt_path=saved)
    counters = strategy.telemetry.counters()
    counters.pop("wait_seconds")
    return bits(weights(module)), own, counters


def resumed_everywhere(rank: int, folder: Path) -> Any:
    """From steps where both levels, the lower one or none has an exchange next."""
    runs = [resumed(rank, folder, step) for step in (None, 5, 10, 20)]
    return runs, [resumed(rank, folder / "half", step, True) for step in (None, 10)]


def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for runs in run_workers(resumed_everywhere, tmp_path, workers=4, timeout=120):
        for straight, *others in runs:
            assert all(other == straight for other in others)


def regrouped(rank: int, folder: Path) -> Any:
    """Warnings, and own weights at the start, where groups are others or lack a file."""
    found = []
    resumed(rank, folder, None)
    for groups in (TREE["groups"], 2, [[0, 3], [1, 2]], Groups(2, tau=2), None, TREE["groups"]):
        if rank == 3 and len(found) == 5:
            (file,) = folder.glob("step=10.ckpt.workers/*-3.ckpt")
            file.unlink()
        with pytest.MonkeyPatch.context() as patch:
            warned: list[str] = []
            patch.setattr("warnings.warn", lambda m, *_, w=warned, **__: w.append(str(m)))
            module, own = Toy(ADAMW), []
            module.on_train_start = lambda m=module, own=own: own.append(bits(weights(m)))
            trainer(4, EASGDStrategy(tau=4, groups=groups), max_epochs=2).fit(
                module, Resumable(rank, 9), ckpt_path=folder / "step=10.ckpt"
            )
        found.append((sorted(w for w in warned if "at the center" in w), own))
    return found


def test_groups_that_cannot_go_on_together_start_at_the_center(tmp_path: Path) -> None:
    runs = run_workers(regrouped, tmp_path, workers=4, timeout=120)
    for case, at_center in enumerate([[], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [], [0, 3]]):
        assert len(runs[0][case][0]) == len(at_center)
        own = [str(run[case][1]) for run in runs]
        assert len(set(own)) == 4 - max(0, len(at_center) - 1)
        assert len({own[rank] for rank in at_center}) <= 1


@pytest.mark.parametrize("who", [2, 3], ids=["first", "second"])
def test_a_member_that_is_killed_is_named_to_all_workers(
    who: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_one(monkeypatch, {"tau": 8, "groups": Groups(2, tau=2)}, [24] * 4, who, at=7)


@pytest.mark.parametrize(
    ("who", "counts", "within"),
    [(3, [22, 5, 22, 20], {13, 17}), (1, [22, 5, 22, 9], {9, 13, 17})],
    ids=["one that trains", "one that stands still"],
)
def test_a_signal_to_any_member_stops_all_and_they_go_on_bit_for_bit(
    who: int, counts: list[int], within: set[int], tmp_path: Path
) -> None:
    taken, _ = stop_and_go_on(tmp_path, TREE, counts, who)
    assert taken in within


def test_who_stops_alone_in_a_group_waits_for_all_others() -> None:
    assert stop_alone(TREE) == [13, 6, 13, 13]


def poisoned(rank: int) -> None:
    module = Toy(SGD)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        module.w.data[0, 0] = float("nan")

    module.on_train_batch_start = on_train_batch_start
    fitting = trainer(4, EASGDStrategy(**TREE))
    warnings.filterwarnings("ignore", "At step")
    with pytest.raises(NonFiniteError, match="every worker"):
        fitting.fit(module, loader(rank, 20))


def test_training_ends_where_no_worker_has_finite_weights() -> None:
    run_workers(poisoned, workers=4)


def drifting(rank: int) -> None:
    """The center of a group is another one at worker 1 than at its mate, worker 2."""
    module, strategy = Toy(SGD), EASGDStrategy(**TREE)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 3:
            strategy._fit.center.group.cohorts[0].fragments[0].center.parts[0][0] += 1

    module.on_train_batch_start = on_train_batch_start
    trainer(4, strategy).fit(module, loader(rank, 40))


def test_a_center_of_a_group_that_drifts_apart_is_told() -> None:
    outcomes = run_workers(drifting, workers=4, check=False)
    assert all(outcome.error == "ExchangeError" for outcome in outcomes)
    assert "drifted apart (worker 1: center checksum" in outcomes[1].message
    assert "worker 2: center checksum" in outcomes[2].message


def refused(rank: int) -> None:
    unstable = EASGDStrategy(groups=Groups([[0, 1], [2]], beta=1.1))
    with pytest.raises(ValueError, match=r"Inside a group of 1, .*Set beta below 1"):
        trainer(3, unstable).fit(Toy(SGD), loader(rank, 2))
    with pytest.raises(ValueError, match="groups=2 does not divide the 3 workers"):
        trainer(3, EASGDStrategy(groups=Groups(2))).fit(Toy(SGD), loader(rank, 2))


def test_what_is_unstable_in_one_group_is_refused_on_all_workers() -> None:
    run_workers(refused, workers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 5}, r"tau=5 is not a multiple of the tau=2 inside groups.* tau=4"),
        ({"tau": 1}, r"not a multiple .* tau=2\."),
        ({"tau": "auto"}, "tau='auto' is not possible with Groups.*Give it a number, or groups=2"),
        ({"tau": lambda step: 4}, "tau=.* is not possible with Groups"),
        ({"beta": Cosine(0.9, 0.1)}, "beta=.* cannot change while training goes on"),
        ({"alpha": lambda step: 0.1}, "alpha=.* cannot change while training goes on"),
        ({"rho": 0.1}, "rho=0.1 is not possible with Groups.*Leave rho out, or groups=2"),
        ({"fragments": 2}, "fragments=2 is not possible"),
        ({"compression": "int8"}, "compression='int8' is not possible"),
        ({"center_device": "cpu"}, "center_device='cpu' is not possible"),
        ({"center_average": "ema"}, "center_average='ema' is not possible"),
        ({"algorithm": "sma"}, r"algorithm=SMA.* is not possible with Groups"),
        ({"algorithm": "local_sgd"}, r"algorithm=LocalSGD.* Set algorithm='easgd', or groups=2"),
    ],
)
def test_what_is_not_possible_with_centers_of_groups_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**{"tau": 4, "groups": Groups(2, tau=2), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": None}, "does not name groups"),
        ({"members": 0}, "does not name groups"),
        ({"tau": 0}, "tau=0 is not a communication period"),
        ({"tau": "auto"}, "cannot change while training goes on"),
        ({"rho": lambda step: 1}, "rho.* cannot change while training goes on"),
        ({"beta": 2}, "beta=2 is not allowed"),
        ({"beta": 0.9, "alpha": 0.1}, "at most one of beta, alpha and rho"),
    ],
)
def test_what_makes_no_groups_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(**{"members": 2, **options})
