"""Running averages of the center: what is shown, saved and delivered, and what trains on."""

from __future__ import annotations

import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from noisy_quadratic import ETA, SIGMA, H, P, noisy_quadratic
from staying import run_workers
from torch import nn
from toy import Resumable, Toy, batches, initial_weights, loader, trainer, weights

from lightning_easgd import CenterAverage, EASGDStrategy
from lightning_easgd.algorithms import AVERAGED

SGD = partial(torch.optim.SGD, lr=0.05)
POLYAK = {"center_average": "polyak"}


class WithNorm(Toy):
    """The toy behind a BatchNorm, which is validated."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(SGD, dtype=dtype)
        self.norm = nn.BatchNorm1d(3, affine=False, dtype=dtype)
        self.shown: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return super().training_step((self.norm(x), y), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.shown.append(numbers(self.state_dict()))


def numbers(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: value.detach().double().numpy().copy() for key, value in state.items()}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, other[key], equal_nan=True) for key, value in one.items())


def watched(rank: int, folder: Path, options: dict[str, Any]) -> Any:
    """A run that saves and validates at step 6, and what was seen of it."""
    dtype = options.pop("dtype", torch.float64)
    module, strategy, centers, own = WithNorm(dtype), EASGDStrategy(**options), [], []
    module.on_train_batch_end = lambda *_: centers.append(numbers(strategy.center_state_dict()))
    module.on_validation_model_zero_grad = lambda: own.append(weights(module))
    module.on_train_batch_start = lambda *_: own.append(weights(module)) if own else None
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)
    more = {"val_check_interval": 6, "num_sanity_val_steps": 0}
    fitting = trainer(2, strategy, callbacks=[saving], enable_checkpointing=True, **more)
    fitting.fit(module, loader(rank, 13, dtype), loader(0, 1, dtype))
    shown = {"shown": module.shown[0], "own": own, "end": numbers(module.state_dict())}
    return shown | {"centers": centers, "last": numbers(strategy.center_state_dict())}


def watch_all(rank: int, folder: Path) -> Any:
    found = {}
    for algorithm in ("easgd", "downpour"):
        for name, more in {
            "plain": {},
            "polyak": POLYAK,
            "offloaded": POLYAK | {"center_device": "cpu"},
            "by worker": POLYAK | {"evaluate_on": "worker"},
            "left open": POLYAK | {"final_exchange": False},
            "half": POLYAK | {"dtype": torch.bfloat16},
        }.items():
            options = {"algorithm": algorithm, "tau": 3, **more}
            found[algorithm, name] = watched(rank, folder / f"{algorithm} {name}", options)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("watched")
    return folder, run_workers(watch_all, folder, workers=2)


def mean_of(centers: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    """Polyak's average, of the start and of each center that is not the one before."""
    known = [initial_weights()[key]]
    for center in centers:
        if not np.array_equal(center[key], known[-1]):
            known.append(center[key])
    return np.mean(known, axis=0)


@pytest.mark.parametrize("algorithm", ["easgd", "downpour"])
def test_the_center_is_as_without_and_what_is_delivered_its_average(
    runs: Any, algorithm: str
) -> None:
    for found in runs[1]:
        plain, averaged = found[algorithm, "plain"], found[algorithm, "polyak"]
        assert all(map(equal, plain["centers"], averaged["centers"]))
        assert equal(plain["end"], averaged["last"])
        assert equal(plain["last"], plain["end"])
        for key in ("w", "b"):
            centers = [*averaged["centers"], averaged["last"]]
            expected = mean_of(centers, key)
            np.testing.assert_allclose(averaged["end"][key], expected, rtol=0, atol=1e-12)
            assert not np.allclose(averaged["end"][key], averaged["last"][key], atol=1e-6)
        for key in ("norm.running_mean", "norm.running_var"):  # not averaged over time
            assert np.array_equal(averaged["end"][key], plain["end"][key])


@pytest.mark.parametrize("algorithm", ["easgd", "downpour"])
def test_validation_and_checkpoints_have_the_average_and_training_goes_on_without_it(
    runs: Any, algorithm: str
) -> None:
    folder, found = runs
    first, second = (run[algorithm, "polyak"] for run in found)
    saved = torch.load(folder / f"{algorithm} polyak" / "step=6.ckpt", weights_only=True)
    assert equal(numbers(saved["state_dict"]), first["shown"])
    center = numbers(saved["lightning_easgd"]["averaged"]["center"])
    assert equal(center, first["centers"][5])
    assert not equal(center, first["shown"])
    for run in (first, second):
        assert equal(run["shown"], first["shown"])
        np.testing.assert_allclose(
            run["shown"]["w"], mean_of(run["centers"][:6], "w"), rtol=0, atol=1e-12
        )
        before, after, *_ = run["own"]
        assert equal(before, after)
        assert not equal(before, run["shown"])
    by_worker = found[1][algorithm, "by worker"]
    assert not equal(by_worker["shown"], first["shown"])
    assert equal(by_worker["end"], first["end"])


@pytest.mark.parametrize("algorithm", ["easgd", "downpour"])
def test_memory_of_the_host_and_no_last_exchange_and_half_precision(
    runs: Any, algorithm: str
) -> None:
    for found in runs[1]:
        whole, offloaded = found[algorithm, "polyak"], found[algorithm, "offloaded"]
        assert equal(whole["end"], offloaded["end"])
        left_open = found[algorithm, "left open"]
        for key in ("w", "b"):
            expected = mean_of(left_open["centers"], key)
            np.testing.assert_allclose(left_open["end"][key], expected, rtol=0, atol=1e-12)
        assert not equal(left_open["end"], whole["end"])
        half = found[algorithm, "half"]
        assert all(np.isfinite(value).all() for value in half["end"].values())
        np.testing.assert_allclose(half["end"]["w"], whole["end"]["w"], rtol=0, atol=0.1)


class Casting(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step([part.to(self.w.dtype) for part in batch], batch_idx)


def fit(rank: int, workers: int, folder: Path, options: dict[str, Any], start: str | None) -> Any:
    """Ten steps from the start, or the last of them from a checkpoint; with all that was seen."""
    dtype = options.get("dtype", torch.float64)
    own = {key: value for key, value in options.items() if key != "dtype"}
    module, strategy = Casting(SGD, dtype=dtype), EASGDStrategy(**{"tau": 2, **own})
    began, centers = [], []
    module.on_train_start = lambda: began.append(weights(module))
    module.on_train_batch_end = lambda *_: centers.append(numbers(strategy.center_state_dict()))
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    fitting = trainer(
        workers, strategy, callbacks=[saving], enable_checkpointing=True, max_epochs=2
    )
    fitting.fit(module, Resumable(rank, 5), ckpt_path=start and folder / start)
    centers.append(numbers(strategy.center_state_dict()))
    return began[0], centers, weights(module)


RESUMED = {
    "the same": (POLYAK, POLYAK),
    "half": (POLYAK | {"dtype": torch.bfloat16}, POLYAK | {"dtype": torch.bfloat16}),
    "left off": (POLYAK, {}),
    "begun": ({}, POLYAK),
    "other fragments": (POLYAK | {"fragments": 2}, POLYAK),
}


def resume_all(rank: int, folder: Path) -> Any:
    found = {}
    for name, (before, after) in RESUMED.items():
        ends = fit(rank, 2, folder / name, before, None)
        found[name] = ends, fit(rank, 2, folder / name, after, "step=5.ckpt")
    return found


def mix(z: np.ndarray, moves: int, centers: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    """Polyak's average that goes on after so many moves."""
    last = centers[0][key]
    for center in centers[1:]:
        if not np.array_equal(center[key], last):
            last, moves = center[key], moves + 1
            z = z + (last - z) / (moves + 1)
    return z


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_what_is_resumed_goes_on_with_the_center_and_the_average_if_it_has_one(
    tmp_path: Path,
) -> None:
    for found in run_workers(resume_all, tmp_path, workers=2):
        for name, ((_, centers, end), (_, resumed, resumed_end)) in found.items():
            if name != "other fragments":
                assert all(map(equal, centers[5:], resumed)), name
            if name in ("the same", "half"):
                assert equal(end, resumed_end), name
        _, (_, centers, end) = found["left off"]
        assert equal(end, centers[-1])
        (_, before, _), (_, centers, end) = found["begun"]
        for key, value in end.items():
            start = before[4]
            expected = mix(start[key], 0, [start, *centers], key)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
        _, (_, centers, end) = found["other fragments"]
        saved = torch.load(tmp_path / "other fragments" / "step=5.ckpt", weights_only=True)
        averaged = saved["lightning_easgd"]["averaged"]
        (moves,) = averaged["moves"].values()
        assert len(moves) == 2
        for key, value in end.items():
            start = numbers(averaged["center"])
            z = numbers(saved["state_dict"])[key]
            expected = mix(z, min(moves), [start, *centers], key)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_new_workers_start_at_the_center_and_not_at_its_average(tmp_path: Path) -> None:
    def grown(rank: int, workers: int, start: str | None) -> Any:
        return fit(rank, workers, tmp_path, {"algorithm": "downpour", **POLYAK}, start)

    run_workers(grown, 1, None, workers=1)
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    center = numbers(saved["lightning_easgd"]["averaged"]["center"])
    _, (began, *_) = run_workers(grown, 2, "step=5.ckpt", workers=2)
    assert equal(began, center)
    assert not equal(began, numbers(saved["state_dict"]))


def unfreezing(rank: int) -> Any:
    module, strategy, centers = Toy(SGD), EASGDStrategy(tau=2, **POLYAK), []
    module.b.requires_grad_(False)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            module.b.requires_grad_(True)

    module.on_train_batch_start = on_train_batch_start
    module.on_train_batch_end = lambda *_: centers.append(numbers(strategy.center_state_dict()))
    trainer(2, strategy).fit(module, loader(rank, 14))
    return [*centers, numbers(strategy.center_state_dict())], weights(module)


def test_a_parameter_that_joins_later_is_averaged_from_then_on() -> None:
    for centers, end in run_workers(unfreezing, workers=2):
        distinct = [len({center[key].tobytes() for center in centers}) for key in ("w", "b")]
        assert distinct[0] > distinct[1] > 3
        for key, value in end.items():
            np.testing.assert_allclose(value, mean_of(centers, key), rtol=0, atol=1e-12)


def alone(rank: int, average: Any) -> Any:
    module = Toy(SGD)
    strategy = EASGDStrategy(algorithm="downpour", tau=1, center_average=average)
    trainer(1, strategy).fit(module, loader(0, 30))
    return weights(module)


@pytest.mark.parametrize(("average", "a"), [("polyak", None), (CenterAverage("ema", 0.2), 0.2)])
def test_one_worker_at_every_step_is_averaged_sgd(average: Any, a: float | None) -> None:
    x = initial_weights()
    expected = reference.Average(x, a)
    for batch in batches(0, 30):
        gradient = reference.toy_gradient(x, batch)
        x = {key: x[key] - 0.05 * gradient[key] for key in x}
        for key, value in x.items():
            expected.follow(key, value)
    (end,) = run_workers(alone, average, workers=1)
    for key, value in end.items():
        np.testing.assert_allclose(value, expected.z[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1, 4])
def test_the_variance_of_polyaks_average_goes_to_its_limit(tau: int) -> None:
    """t·Var -> σ²/(p h²) on the noisy quadratic, after t steps with τ = 1, whatever α and η.

    In general, what τ steps of noise leave, Σ_j η q^j σ ξ_j, over what a step takes back, 1 - q^τ.
    """
    samples, steps, q = 10_000, 800, 1 - ETA * H
    left = ETA**2 * SIGMA**2 / P * sum(q ** (2 * j) for j in range(tau))
    expected = tau * left / (1 - q**tau) ** 2
    assert tau > 1 or expected == pytest.approx(SIGMA**2 / (P * H**2))
    z, average, moves = None, CenterAverage("polyak"), 0
    for t, (_, center) in enumerate(noisy_quadratic(tau, steps, samples)):
        if z is None:
            z = center.clone()
        elif t % tau == 0:
            moves += 1
            average.follow_([z], [center], moves)
    found = steps * float(z.var())
    assert found == pytest.approx(expected, rel=0.03 + 4 * math.sqrt(2 / samples))


def test_the_rate_of_an_average() -> None:
    assert [CenterAverage("polyak").weight(t) for t in (1, 2, 9)] == [1 / 2, 1 / 3, 1 / 10]
    assert [CenterAverage("ema").weight(t) for t in (1, 2, 9)] == [0.001] * 3
    assert CenterAverage("ema", 1).weight(5) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EASGDStrategy(center_average="mean"), r"'mean' is .*Allowed: None, 'polyak', 'e"),
        (lambda: EASGDStrategy(center_average=True), "center_average=True is not allowed"),
        (lambda: EASGDStrategy(center_average=0.1), r"0\.1 .*CenterAverage\('ema', rate="),
        (lambda: CenterAverage("mean"), "kind='mean' is not allowed. Allowed: 'polyak', 'ema'"),
        (lambda: CenterAverage("polyak", 0.1), "no meaning for 'polyak'"),
        (lambda: CenterAverage("ema", 0), r"rate=0 .*Allowed: a number in \(0, 1\]"),
        (lambda: CenterAverage("ema", 1.1), r"rate=1\.1 "),
        (lambda: CenterAverage("ema", True), "rate=True "),
    ],
)
def test_an_average_that_there_is_not_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_rules_have_names_and_survive_a_copy(name: str) -> None:
    for suffix in ("", "_spawn", "_fork", "_notebook"):
        strategy = trainer(1, name + suffix).strategy
        assert isinstance(strategy, EASGDStrategy)
        assert type(strategy.options.rules.algorithm).__name__ == "Downpour"
        kind = {"adownpour": "polyak", "mvadownpour": "ema"}[name]
        assert strategy.options.averaging == CenterAverage(kind)
        assert pickle.loads(pickle.dumps(strategy.options.averaging)) == strategy.options.averaging


def unlike(rank: int) -> None:
    strategy = EASGDStrategy(center_average=["polyak", None][rank])
    trainer(2, strategy).fit(Toy(SGD), loader(rank, 2))


def test_workers_with_different_averages_are_told() -> None:
    outcomes = run_workers(unlike, workers=2, check=False)
    assert all("center_average=" in outcome.message for outcome in outcomes)


def test_a_center_that_stayed_in_another_process_is_not_taken_for_its_average() -> None:
    strategy = EASGDStrategy(center_average="polyak")
    strategy._lightning_module = Toy(SGD)
    with pytest.raises(RuntimeError, match="known only where it was trained"):
        strategy.center_state_dict()
