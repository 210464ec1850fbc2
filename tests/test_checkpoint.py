"""Stopping and going on: what is saved, and that a resumed run is the same run."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from staying import run_workers
from torch import Tensor
from torch.utils.data import DataLoader
from toy import Batches, Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.center.digest import fingerprint
from lightning_easgd.checkpoint.files import workers_folder
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO

# Most resumed runs here save nothing themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Exchanges average the buffer"),
]

SGD = partial(torch.optim.SGD, lr=0.1)
NESTEROV = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
ADAMW = partial(torch.optim.AdamW, lr=0.05)
STEPS = 6
"""Steps of an epoch."""


class Noisy(Toy):
    """Draws from torch's generator in every step, as dropout does, under a cosine schedule."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("running", torch.zeros(2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.running.lerp_(x.mean().float() + torch.zeros(2), 0.1)
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Trace(Callback):
    """The worker's own weights after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        own = {n: v.tobytes() for n, v in weights(pl_module).items()}
        self.weights[trainer.global_step] = own, pl_module.running.tolist()


def everything(fitting: pl.Trainer, module: pl.LightningModule) -> Any:
    """The center, the worker's optimizer and the counters, comparable."""
    state = [optimizer.state_dict() for optimizer in fitting.optimizers]
    telemetry = fitting.strategy.telemetry
    return fingerprint(module.state_dict()), fingerprint(state), telemetry.exchanges, telemetry.tau


def fit(
    rank: int,
    folder: Path,
    make: Any,
    options: dict[str, Any],
    *,
    resume: str | None = None,
    stateful: bool = True,
    kind: type[Noisy] = Noisy,
    **checkpointing: Any,
) -> Any:
    torch.manual_seed(100 + rank)
    module, trace = kind(make), Trace()
    callbacks: list[Callback] = [trace]
    if checkpointing:
        callbacks.append(ModelCheckpoint(folder, **{"filename": "{step}", **checkpointing}))
    fitting = trainer(
        2,
        EASGDStrategy(**options),
        max_epochs=4,
        callbacks=callbacks,
        enable_checkpointing=bool(checkpointing),
    )
    shuffled = DataLoader(Batches(rank, STEPS), batch_size=None, shuffle=True)
    fitting.fit(module, Resumable(rank, STEPS) if stateful else shuffled, ckpt_path=resume)
    return trace.weights, everything(fitting, module)


def resumed_everywhere(rank: int, folder: Path, make: Any, options: dict[str, Any]) -> Any:
    saving = {"every_n_train_steps": 1, "save_top_k": -1}
    undisturbed = fit(rank, folder, make, options, **saving)
    outcomes = {}
    for step in (4, 5, 6, 10, 12, 17, 24):
        path = str(folder / f"step={step}.ckpt")
        outcomes[step] = fit(rank, folder, make, options, resume=path)
    return undisturbed, outcomes


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SGD, {"tau": 4}),
        (NESTEROV, {"tau": 5}),
        (NESTEROV, {"tau": 3, "overlap": False}),
        (ADAMW, {"tau": 4, "buffers": "local"}),
        (NESTEROV, {"tau": lambda step: 2 + step % 3}),
    ],
    ids=["sgd", "nesterov", "blocking", "adamw", "callable"],
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    for undisturbed, outcomes in run_workers(
        resumed_everywhere, tmp_path, make, options, workers=2, timeout=120
    ):
        for step, (steps, end) in outcomes.items():
            assert steps == {n: w for n, w in undisturbed[0].items() if n > step}, step
            assert end == undisturbed[1], step


def resumed_at_epochs(rank: int, folder: Path) -> Any:
    """Saved by validation, which shows the center, between epochs of a shuffling loader."""
    options: dict[str, Any] = {"tau": 4}
    undisturbed = fit(rank, folder, NESTEROV, options, stateful=False, save_top_k=-1)
    resumed = {}
    for step in (2 * STEPS, 4 * STEPS):
        path = str(folder / f"step={step}.ckpt")
        resumed[step] = fit(rank, folder, NESTEROV, options, stateful=False, resume=path)
    return undisturbed, resumed


def test_between_epochs_and_after_the_last_the_rest_is_the_same(tmp_path: Path) -> None:
    for undisturbed, resumed in run_workers(resumed_at_epochs, tmp_path, workers=2):
        for step, (steps, end) in resumed.items():
            assert steps == {n: w for n, w in undisturbed[0].items() if n > step}, step
            assert end == undisturbed[1], step


def resumed_again(rank: int, folder: Path, stops: tuple[int, ...]) -> Any:
    saving = {"every_n_train_steps": 1, "save_top_k": -1, "enable_version_counter": False}
    undisturbed = fit(rank, folder, NESTEROV, {"tau": 4}, **saving)
    for step in stops:
        path = str(folder / f"step={step}.ckpt")
        steps, end = fit(rank, folder, NESTEROV, {"tau": 4}, resume=path, **saving)
        assert steps == {n: w for n, w in undisturbed[0].items() if n > step}, step
        assert end == undisturbed[1], step


@pytest.mark.parametrize("stops", [(3, 10, 17, 24), (6, 12, 18, 24), (6, 10, 11, 18, 19)])
def test_a_run_that_is_resumed_again_and_again_has_the_same_bits(
    stops: tuple[int, ...], tmp_path: Path
) -> None:
    run_workers(resumed_again, tmp_path, stops, workers=2)


class Estimating(Noisy):
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 4 * STEPS
        return super().configure_optimizers()


def resumed_after_estimating(rank: int, folder: Path) -> Any:
    options: dict[str, Any] = {"tau": 4}
    undisturbed = fit(rank, folder, NESTEROV, options, kind=Estimating, **SAVING)
    path = str(folder / "step=9.ckpt")
    return undisturbed, fit(rank, folder, NESTEROV, options, kind=Estimating, resume=path)


def test_a_loader_made_to_estimate_the_steps_gets_its_state_too(tmp_path: Path) -> None:
    for undisturbed, (steps, end) in run_workers(resumed_after_estimating, tmp_path, workers=2):
        assert steps == {n: w for n, w in undisturbed[0].items() if n > 9}
        assert end == undisturbed[1]


class Validated(Noisy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", float(self.w.sum()), sync_dist=True)


def saved_while_validating(rank: int, folder: Path, precision: Any) -> Any:
    def run(resume: str | None) -> Any:
        torch.manual_seed(rank)
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        module, trace = Validated(NESTEROV, dtype=dtype), Trace()
        saving = ModelCheckpoint(folder, "{step}", monitor="seen", save_top_k=-1)
        fitting = trainer(
            2,
            EASGDStrategy(tau=4),
            max_epochs=3,
            precision=precision,
            callbacks=[trace, saving],
            enable_checkpointing=True,
            val_check_interval=3,
            num_sanity_val_steps=0,
        )
        data = Resumable(rank, STEPS)
        data.items = Batches(rank, STEPS, dtype)
        fitting.fit(
            module, data, DataLoader(Batches(0, 1, dtype), batch_size=None), ckpt_path=resume
        )
        return trace.weights, everything(fitting, module)

    return run(None), run(str(folder / "step=9.ckpt"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_made_while_the_module_shows_the_center(
    precision: str, tmp_path: Path
) -> None:
    for undisturbed, (steps, end) in run_workers(
        saved_while_validating, tmp_path, precision, workers=2
    ):
        assert steps == {n: w for n, w in undisturbed[0].items() if n > 9}
        assert end == undisturbed[1]


SAVING = {"every_n_train_steps": 9, "save_top_k": -1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step=9.ckpt and step=18.ckpt of two workers; not to be written to."""
    folder = tmp_path_factory.mktemp("saved")
    run_workers(partial(fit, **SAVING), folder, NESTEROV, {"tau": 4}, workers=2)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """step=9.ckpt of two workers, to be spoilt."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "step=9.ckpt"


def worker_file(path: Path, rank: int) -> Path:
    (found,) = Path(workers_folder(path)).glob(f"*-{rank}.ckpt")
    return found


def test_the_main_file_is_a_lightning_checkpoint_of_the_center(saved: Path) -> None:
    content = torch.load(saved / "step=9.ckpt", weights_only=True)
    own = [torch.load(worker_file(saved / "step=9.ckpt", r), weights_only=True) for r in range(2)]
    w = [part["weights"]["tensors"]["w"] for part in own]
    assert not torch.equal(w[0], w[1])
    assert not any(torch.equal(content["state_dict"]["w"], each) for each in w)
    assert {"epoch", "global_step", "loops", "callbacks", "optimizer_states"} <= content.keys()
    assert own[0]["checkpoint"] == {}  # the main file has worker 0's
    assert "state_dict" not in own[1]["checkpoint"]
    moments = [each["optimizer_states"][0]["state"][0] for each in (content, own[1]["checkpoint"])]
    assert not torch.equal(*(each["momentum_buffer"] for each in moments))
    save = content["lightning_easgd"]["save"]
    files = sorted(p.name for p in Path(workers_folder(saved / "step=9.ckpt")).iterdir())
    assert files == [f"{save}-0.ckpt", f"{save}-1.ckpt"]
    assert [(part["save"], part["worker"]) for part in own] == [(save, 0), (save, 1)]


def started(rank: int, path: str, workers: int, strategy: Any = None, lines: Any = None) -> Any:
    """What a worker holds when its first batch begins, and how training ends."""
    module, seen = Noisy(NESTEROV), {}

    def look(*_: Any) -> None:
        if not seen:
            (group,) = module.optimizers().param_groups
            moments = len(module.optimizers().state)
            seen.update(w=weights(module)["w"].tolist(), moments=moments, lr=group["lr"])

    module.on_train_batch_start = look
    fitting = trainer(workers, strategy or EASGDStrategy(tau=4), max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*fresh optimizers")
        fitting.fit(module, Resumable(rank, STEPS), ckpt_path=path)
    texts = [str(w.message) for w in caught if "fresh optimizers" in str(w.message)]
    return seen, texts, fitting.global_step, getattr(fitting.strategy, "telemetry", None)


def expected(path: Path, rank: int | None) -> Any:
    """The weights of a worker's file; of the main file without a rank."""
    content = torch.load(path if rank is None else worker_file(path, rank), weights_only=True)
    state = content["state_dict"] if rank is None else content["weights"]["tensors"]
    return state["w"].tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_goes_on(workers: int, saved: Path) -> None:
    path = saved / "step=9.ckpt"
    outcomes = run_workers(started, str(path), workers, workers=workers)
    for rank, (seen, _, steps, telemetry) in enumerate(outcomes):
        assert seen["w"] == expected(path, rank if rank < 2 else None)
        assert seen["moments"] == (2 if rank < 2 else 0)
        assert seen["lr"] == outcomes[0][0]["lr"] < 0.05
        assert steps == 3 * STEPS
        assert telemetry.alpha == pytest.approx(0.9 / workers)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["weights"]["tensors"]["w"][0, 0] += 1e-3
    torch.save(content, path)


def garble(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


SPOIL = [Path.unlink, truncate, alter, garble]


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_damaged_worker_starts_at_the_center_with_a_warning(spoil: Any, copy: Path) -> None:
    own = expected(copy, 0)
    spoil(worker_file(copy, 1))
    zero, one = run_workers(started, str(copy), 2, workers=2)
    assert zero[0]["w"] == own
    assert zero[0]["moments"] == 2
    assert one[0] == {"w": expected(copy, None), "moments": 0, "lr": zero[0]["lr"]}
    (text,) = zero[1]
    assert text.startswith("Worker 1 starts at the center")
    assert "1.ckpt" in text
    assert "\n" not in text


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_damaged_worker_is_an_error_on_all_if_strict(spoil: Any, copy: Path) -> None:
    spoil(worker_file(copy, 1))
    strategy = EASGDStrategy(tau=4, strict_resume=True)
    for outcome in run_workers(started, str(copy), 2, strategy, workers=2, check=False):
        assert outcome.error == "CheckpointError"
        assert "worker 1: " in outcome.message
        assert "strict_resume" in outcome.message


def test_without_the_folder_all_workers_start_at_the_center(copy: Path) -> None:
    shutil.rmtree(workers_folder(copy))
    for seen, _, steps, _ in run_workers(started, str(copy), 2, workers=2):
        assert seen["w"] == expected(copy, None)
        assert seen["moments"] == 0
        assert steps == 3 * STEPS


def timed(rank: int, folder: Path) -> list[int]:
    """Saves whenever worker 0's clock, and no other's, says that it is time."""
    steps: list[int] = []
    interval = timedelta(0) if rank == 0 else timedelta(days=1)
    saving = ModelCheckpoint(folder, train_time_interval=interval, save_top_k=1)
    options = {"enable_checkpointing": True, "callbacks": [saving]}
    module = Noisy(SGD)
    module.on_save_checkpoint = lambda _: steps.append(module.global_step)
    trainer(2, EASGDStrategy(tau=2), **options).fit(module, Resumable(rank, STEPS))
    return steps


def test_worker_0s_clock_says_when_all_save(tmp_path: Path) -> None:
    one, two = run_workers(timed, tmp_path, workers=2)
    assert one == two
    assert len(one) > 2


def test_a_link_finds_the_workers_of_its_target(copy: Path) -> None:
    link = copy.with_name("last.ckpt")
    link.symlink_to(copy.name)
    for rank, (seen, texts, *_) in enumerate(run_workers(started, str(link), 2, workers=2)):
        assert seen["w"] == expected(copy, rank)
        assert not texts


def test_ddp_goes_on_from_a_checkpoint_of_ours(saved: Path) -> None:
    path = saved / "step=9.ckpt"
    for seen, *_ in run_workers(started, str(path), 2, DDPStrategy(), workers=2):
        assert seen["w"] == expected(path, None)
        assert seen["moments"] == 2


def other_model(rank: int, path: str) -> None:
    module = Noisy(NESTEROV)
    module.extra = torch.nn.Parameter(torch.zeros(1))
    trainer(2, EASGDStrategy()).fit(module, Resumable(rank, STEPS), ckpt_path=path)


def test_another_model_is_refused_with_the_keys_that_differ(saved: Path) -> None:
    path = str(saved / "step=9.ckpt")
    for outcome in run_workers(other_model, path, workers=2, check=False):
        assert outcome.error == "RuntimeError"
        assert 'Missing key(s) in state_dict: "extra"' in outcome.message


def test_a_newer_layout_is_refused(copy: Path) -> None:
    content = torch.load(copy, weights_only=True)
    content["lightning_easgd"]["format"] = 99
    torch.save(content, copy)
    for outcome in run_workers(started, str(copy), 2, workers=2, check=False):
        assert outcome.error == "CheckpointError"
        assert "layout 99" in outcome.message


def kept(rank: int, folder: Path) -> list[str]:
    fit(rank, folder, SGD, {"tau": 4}, every_n_train_steps=5, save_top_k=1, save_last=True)
    return sorted(os.listdir(folder))


def test_removing_a_checkpoint_removes_its_workers(tmp_path: Path) -> None:
    run_workers(kept, tmp_path, workers=2)
    names = {"last.ckpt", "step=20.ckpt"}
    assert {p.name for p in tmp_path.iterdir()} == names | {n + ".workers" for n in names}
    for name in names:
        assert len(list(Path(workers_folder(tmp_path / name)).iterdir())) == 2


class Failing(AtomicCheckpointIO):
    """Fails on one worker from the second save on, while it writes what matches."""

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what, self.left = rank, what, 1

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if str(path).endswith(self.what) and os.environ["RANK"] == str(self.rank):
            self.left -= 1
            if self.left < 0:
                raise OSError("disk full")
        super().save_checkpoint(checkpoint, path, storage_options)


def failing(rank: int, folder: Path, who: int, what: str) -> None:
    saving = {"every_n_train_steps": 5, "filename": "last", "enable_version_counter": False}
    storage = Failing(who, what)
    fit(rank, folder, SGD, {"tau": 4, "checkpoint_io": storage}, save_top_k=1, **saving)


@pytest.mark.parametrize(("who", "what"), [(1, "1.ckpt"), (0, "0.ckpt")])
def test_a_worker_that_cannot_write_fails_all_and_leaves_the_checkpoint_before(
    who: int, what: str, tmp_path: Path
) -> None:
    outcomes = run_workers(failing, tmp_path, who, what, workers=2, check=False)
    assert outcomes[who].error == "OSError"
    assert outcomes[1 - who].error == "CheckpointError"
    assert f'worker {who}: "OSError on ' in outcomes[1 - who].message
    assert "disk full" in outcomes[1 - who].message
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 5
    for rank, (seen, texts, *_) in enumerate(run_workers(started, str(path), 2, workers=2)):
        assert seen["w"] == expected(path, rank)
        assert not texts


def raising(rank: int, folder: Path, who: int) -> None:
    module = Noisy(SGD)

    def fail(batch: Any, batch_idx: int) -> None:
        if rank == who and batch_idx == 1:
            raise ZeroDivisionError("on one worker")

    module.on_train_batch_start = fail
    callbacks = [
        OnExceptionCheckpoint(folder / "exception"),
        ModelCheckpoint(folder, "saved", save_on_exception=True, save_last=True),
    ]
    options = {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": 4}
    trainer(2, EASGDStrategy(tau=2), **options).fit(module, Resumable(rank, STEPS))


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # OnExceptionCheckpoint looks for one to resume
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_on_one_worker_saves_the_center_without_waiting(
    who: int, tmp_path: Path
) -> None:
    outcomes = run_workers(raising, tmp_path, who, workers=2, timeout=30, check=False)
    assert outcomes[who].error == "ZeroDivisionError"
    assert outcomes[1 - who].error == "ExchangeError"
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert content["global_step"] in range(1, 5)
    assert "lightning_easgd" not in content
    assert not Path(workers_folder(tmp_path / "saved.ckpt")).exists()


def asynchronous(rank: int, folder: Path) -> Any:
    options = {"tau": 4, "checkpoint_io": AsyncCheckpointIO()}
    return fit(rank, folder, NESTEROV, options, **SAVING)


def test_asynchronous_io(tmp_path: Path, saved: Path) -> None:
    run_workers(asynchronous, tmp_path, workers=2)
    path = tmp_path / "step=9.ckpt"
    for rank, (seen, texts, *_) in enumerate(run_workers(started, str(path), 2, workers=2)):
        assert seen["w"] == expected(saved / "step=9.ckpt", rank)
        assert not texts


def stopped_and_resumed(rank: int, folder: Path, number: signal.Signals) -> Any:
    undisturbed = fit(rank, folder, NESTEROV, {"tau": 4})
    torch.manual_seed(100 + rank)
    module, count = Noisy(NESTEROV), []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        count.append(batch_idx)
        if rank == 1 and len(count) == 6:
            os.kill(os.getpid(), number)

    module.on_train_batch_start = on_train_batch_start
    saving = ModelCheckpoint(folder, "stopped", save_on_exception=True, every_n_epochs=100)
    options = {"max_epochs": 4, "callbacks": [saving], "enable_checkpointing": True}
    fitting = trainer(2, EASGDStrategy(tau=4), **options)
    error = None
    try:
        fitting.fit(module, Resumable(rank, STEPS))
    except BaseException as raised:
        error = type(raised).__name__
    resumed = fit(rank, folder, NESTEROV, {"tau": 4}, resume=str(folder / "stopped.ckpt"))
    return error, fitting.global_step, undisturbed, resumed


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, "SIGTERMException"), (signal.SIGINT, "SystemExit")]
)
def test_a_signal_to_one_worker_stops_all_at_one_step_from_which_they_go_on(
    number: signal.Signals, error: str, tmp_path: Path
) -> None:
    outcomes = run_workers(stopped_and_resumed, tmp_path, number, workers=2)
    for found, step, undisturbed, (steps, end) in outcomes:
        # Batch 6 is in the round that ends with the exchange of step 8, seen by all at that of 12.
        assert (found, step) == (error, 13)
        assert steps == {n: w for n, w in undisturbed[0].items() if n > step}
        assert end == undisturbed[1]
