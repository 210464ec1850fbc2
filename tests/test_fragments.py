"""Exchanges of one fragment after another: the paper's mathematics, parameter by parameter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_reference import LR, OPTIMIZERS, ROWS, STEPS, compare, strength
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import final_bits
from staying import run_in_turn, run_workers
from toy import Resumable, Toy, bits, loader, trainer, weights

from lightning_easgd import EASGDStrategy


@pytest.mark.parametrize(
    ("name", "fragments", "final"),
    [
        # All pairs of values.
        (name, fragments, (n + f) % 2 == 0)
        for n, name in enumerate(OPTIMIZERS)
        for f, fragments in enumerate(ROWS)
    ],
)
def test_each_fragment_follows_the_paper_in_its_turn(
    name: str, fragments: int, final: bool
) -> None:
    compare(
        name,
        2,
        pause := 8 // fragments,
        alpha=strength(2, fragments, pause),
        options={"tau": 8, "fragments": fragments, "final_exchange": final},
    )


def test_a_callable_period_takes_the_same_turns() -> None:
    compare(
        "nesterov",
        2,
        4,
        alpha=strength(2, 2, 4),
        options={"tau": lambda step: 8, "fragments": 2, "final_exchange": False},
    )


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("compression", [None, "int8"])
def test_overlap_changes_no_bit(compression: Any, final: bool) -> None:
    options = {"tau": 4, "fragments": 4, "compression": compression, "final_exchange": final}
    ways: list[Any] = [{"overlap": False}, {"overlap": True, "center_device": "cpu"}]
    cases = [(OPTIMIZERS["nesterov"], options | way) for way in ways]
    blocking, behind = run_in_turn(final_bits, cases, workers=2)
    for got, expected in zip(behind, blocking, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert {k: v.tobytes() for k, v in mine.items()} == {
                k: v.tobytes() for k, v in theirs.items()
            }


def costs(rank: int, fragments: int) -> Any:
    module, largest = Toy(OPTIMIZERS["sgd"]), []
    strategy = EASGDStrategy(tau=8, fragments=fragments, final_exchange=False)

    def note(outputs: Any, batch: Any, batch_idx: int) -> None:
        largest.append(
            sum(part.numel() for part in strategy._fit.center.main._sums._buffers.values())
        )

    module.on_train_batch_end = note
    trainer(2, strategy).fit(module, loader(rank, STEPS))
    return strategy.telemetry.exchanges, max(largest)


def test_the_buffer_of_the_sum_is_a_fragment_large() -> None:
    assert run_workers(costs, 1, workers=2) == [(2, 8)] * 2
    assert run_workers(costs, 4, workers=2) == [(11, 2)] * 2


def validating(rank: int, evaluate_on: str) -> Any:
    """Weights before and during validation in the middle of a round."""
    module, seen = Toy(OPTIMIZERS["sgd"]), {}

    def validation_step(batch: Any, batch_idx: int) -> None:
        seen["shown"] = weights(module)

    module.validation_step = validation_step
    module.on_validation_start = lambda: seen.update(before=weights(module))
    module.on_validation_end = lambda: seen.update(after=weights(module))
    module.on_train_batch_start = lambda *_: seen.update(later=weights(module))
    strategy = EASGDStrategy(tau=4, fragments=2, evaluate_on=evaluate_on)
    fitting = trainer(2, strategy, val_check_interval=7, num_sanity_val_steps=0)
    fitting.fit(module, loader(rank, 8), loader(0, 1))
    return seen, weights(module)


def test_validation_sees_one_center_and_the_worker_gets_its_weights_back() -> None:
    (first, _), (second, _) = run_workers(validating, "center", workers=2)
    own = [run["later"]["w"] for run in (first, second)]
    assert not np.array_equal(*own)
    np.testing.assert_array_equal(first["shown"]["w"], second["shown"]["w"])
    (other, _), _ = run_workers(validating, "worker", workers=2)
    np.testing.assert_array_equal(other["shown"]["w"], own[0])


def resumable(
    rank: int, folder: Path, resume: Path | None, compression: Any, fragments: int
) -> Any:
    module = Toy(partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True))
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    strategy = EASGDStrategy(tau=4, fragments=fragments, compression=compression)
    options = {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [saving]}
    trainer(2, strategy, **options).fit(module, Resumable(rank, 6), ckpt_path=resume)
    return {name: value.tobytes() for name, value in weights(module).items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("compression", [None, "int8"])
def test_resuming_in_the_middle_of_a_round_goes_on_bit_for_bit(
    compression: Any, tmp_path: Path
) -> None:
    straight = run_workers(resumable, tmp_path, None, compression, 4, workers=2)
    saved = tmp_path / "step=10.ckpt"
    assert run_workers(resumable, tmp_path, saved, compression, 4, workers=2) == straight
    other = run_workers(resumable, tmp_path, saved, compression, 2, workers=2)
    assert other[0] == other[1] != straight[0]


def thawing(rank: int) -> Any:
    """A frozen bias joins later."""
    module = Toy(partial(torch.optim.SGD, lr=LR))
    module.b.requires_grad_(False)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        module.b.requires_grad_(batch_idx >= 5)

    module.on_train_batch_start = on_train_batch_start
    trainer(2, EASGDStrategy(tau=3, fragments=3)).fit(module, loader(rank, STEPS))
    return weights(module)


def test_what_is_unfrozen_is_cut_and_joins() -> None:
    first, second = run_workers(thawing, workers=2)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    assert not np.array_equal(first["b"], weights(Toy(OPTIMIZERS["sgd"]))["b"])


def poisoned(rank: int) -> Any:
    module, strategy = Toy(OPTIMIZERS["nesterov"]), EASGDStrategy(tau=4, fragments=2)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if rank == 1 and batch_idx == 9:
            module.w.data[0, 0] = float("nan")  # in the fragment that is exchanged at step 10

    module.on_train_batch_start = on_train_batch_start
    trainer(2, strategy).fit(module, loader(rank, STEPS))
    return strategy.telemetry.non_finite, weights(module)


@pytest.mark.filterwarnings("ignore:At step")
def test_a_poisoned_worker_restarts_whole_from_the_center() -> None:
    (count, first), (_, second) = run_workers(poisoned, workers=2)
    assert count == 1
    for name, value in first.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, second[name])


def looked_at(rank: int, looks: bool) -> dict[str, bytes]:
    """Someone looks at the center in every step and awaits nothing, as an alone worker does."""
    module, strategy = Toy(OPTIMIZERS["nesterov"]), EASGDStrategy(tau=4, fragments=2)

    def on_train_batch_end(*_: Any) -> None:
        if looks:
            strategy._fit.exchange.center_state_dict(module, latest=False)

    module.on_train_batch_end = on_train_batch_end
    trainer(2, strategy).fit(module, loader(rank, STEPS))
    return bits(weights(module))


def test_who_looks_at_the_center_takes_no_memory_from_the_sum_in_flight() -> None:
    looked, unseen = (run_workers(looked_at, looks, workers=2) for looks in (True, False))
    assert looked == unseen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 10, "fragments": 4}, r"tau=10 is not a multiple of fragments=4.*tau=12"),
        ({"fragments": 0}, r"fragments=0 is not allowed"),
        ({"fragments": 1.5}, r"fragments=1.5 is not allowed"),
        ({"fragments": True}, r"fragments=True is not allowed"),
        ({"center_device": "cuda"}, r"center_device='cuda' is not allowed. Allowed: 'cpu', None"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EASGDStrategy(**options)


def too_many(rank: int) -> None:
    trainer(1, EASGDStrategy(tau=6, fragments=6)).fit(Toy(OPTIMIZERS["sgd"]), loader(rank, 2))


def wrong_period(rank: int) -> None:
    strategy = EASGDStrategy(tau=lambda step: 5, fragments=2)
    trainer(1, strategy).fit(Toy(OPTIMIZERS["sgd"]), loader(rank, 2))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            too_many,
            "fragments=6 is too many: the trained parameters of Toy can be cut into at most",
        ),
        (wrong_period, "tau=5 is not a multiple of fragments=2"),
    ],
)
def test_what_shows_at_set_up_is_refused_there(run: Any, message: str) -> None:
    (outcome,) = run_workers(run, workers=1, check=False)
    assert outcome.error == "ValueError"
    assert message in outcome.message
