"""All workers go on from the same checkpoint, or none does, and each is told why."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from staying import run_workers
from toy import Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.checkpoint.state import SharedState, WorkerState
from lightning_easgd.checkpoint.worker_checkpoints import CheckpointError, digest_of_main

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.. is set, but there is no last"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

ADAM = partial(torch.optim.Adam, lr=0.05)
NESTEROV = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
STEPS = 6


class Net(Toy):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("w", self.w.sum())


def saving(folder: Path, **options: Any) -> ModelCheckpoint:
    options = {"every_n_train_steps": 4, "enable_version_counter": False} | options
    return ModelCheckpoint(folder, "last", **options)


def train(
    rank: int,
    folder: Path,
    *,
    ckpt_path: Any = None,
    optimizer: Any = NESTEROV,
    workers: int = 2,
    batches: int = STEPS,
    **options: Any,
) -> Any:
    strategy = EASGDStrategy(**{"tau": 4, "exchange_timeout": 10, **options})
    fitting = trainer(
        workers, strategy, callbacks=[saving(folder)], enable_checkpointing=True, max_epochs=2
    )
    module = Net(optimizer)
    fitting.fit(module, Resumable(rank, batches), ckpt_path=ckpt_path)
    return weights(module)["w"].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with last.ckpt of two workers; not to be written to."""
    folder = tmp_path_factory.mktemp("saved")
    run_workers(train, folder, workers=2)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """last.ckpt of two workers, to be spoilt."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy" / "last.ckpt"


def go_on(rank: int, paths: list[Any], folders: list[Path], function: str) -> Any:
    """Resume, or test, each worker from a path of its own."""
    strategy = EASGDStrategy(tau=4, exchange_timeout=10)
    running = trainer(
        2, strategy, callbacks=[saving(folders[rank])], enable_checkpointing=True, max_epochs=3
    )
    began = time.monotonic()
    try:
        getattr(running, function)(Net(NESTEROV), Resumable(rank, STEPS), ckpt_path=paths[rank])
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began, running.global_step
    return None


@pytest.mark.parametrize("function", ["fit", "test"])
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("how", ["last", "none", "gone", "other", "damaged"])
def test_all_workers_go_on_from_the_same_checkpoint_or_are_told_who_does_not_see_it(
    how: str, without: int, function: str, copy: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    paths: list[Any] = [str(copy), str(copy)]
    folders = [copy.parent, copy.parent]
    if how == "last":
        paths, folders[without] = ["last", "last"], empty
    elif how == "none":
        paths[without] = None
    else:
        paths[without] = str(empty / "last.ckpt")
    if how == "other":
        content = torch.load(copy, weights_only=True)
        del content["lightning_easgd"]
        torch.save(content, empty / "last.ckpt")
    elif how == "damaged":
        (empty / "last.ckpt").write_bytes(copy.read_bytes()[:999])
    outcomes = run_workers(go_on, paths, folders, function, workers=2, timeout=40)
    for error, message, seconds, steps in outcomes:
        assert (error, steps) == ("CheckpointError", 0)
        assert f"worker {without} on {os.uname().nodename}" in message
        for place in {"last": (copy.parent, empty), "none": (copy,)}.get(how, (empty,)):
            assert str(place) in message
        assert seconds < 10


def flip(path: Path, tensor: torch.Tensor) -> None:
    """Flip one bit of the tensor's values in a file."""
    data, values = bytearray(path.read_bytes()), tensor.numpy().tobytes()
    assert data.count(values) == 1
    data[data.index(values) + 3] ^= 16
    path.write_bytes(data)


def flip_weight(path: Path) -> None:
    flip(path, torch.load(path, weights_only=True)["state_dict"]["w"])


def flip_momentum(path: Path) -> None:
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    flip(path, state["state"][0]["momentum_buffer"])


def change_entry(path: Path, **changes: Any) -> None:
    content = torch.load(path, weights_only=True)
    content["lightning_easgd"] |= changes
    torch.save(content, path)


def leave_out(path: Path, name: str) -> None:
    content = torch.load(path, weights_only=True)
    entry = content["lightning_easgd"]
    del entry[name]
    entry["digest"] = digest_of_main(content, entry)
    torch.save(content, path)


def write(path: Path, what: bytes) -> None:
    path.write_bytes(what)


def keep_weights_only(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)


@pytest.mark.parametrize("kind", [SharedState, WorkerState])
def test_a_record_is_read_whole_or_names_what_it_lacks(kind: type[Any]) -> None:
    plain = {field.name: object() for field in fields(kind)}
    assert kind.read({**plain, "more": 1}).plain() == plain
    del plain["agreement"], plain["save"]
    with pytest.raises(ValueError, match=r"it lacks save, agreement$"):
        kind.read(plain)


SPOILT = {
    "weight": (flip_weight, "is damaged: its weights"),
    "momentum": (flip_momentum, "is damaged: its weights, optimizer states"),
    "entry": (partial(change_entry, workers=3), "is damaged"),
    "empty": (partial(write, what=b""), "cannot be read (EOFError"),
    "text": (partial(write, what=b"no checkpoint"), "cannot be read ("),
    "weights only": (keep_weights_only, "is no checkpoint of Lightning's: it holds ['w', 'b']"),
    "older layout": (partial(change_entry, format=1), "has layout 1, this version"),
    "incomplete": (
        partial(leave_out, name="fragment_index"),
        "is not complete: it lacks fragment_index",
    ),
    "no layout": (partial(change_entry, format="x"), "has layout x, this version"),
    "crafted id": (partial(change_entry, save="../../me"), "names its save '../../me'"),
    "no id": (partial(change_entry, save=None), "names its save 'None'"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_main_file_that_is_not_what_was_written_is_an_error_that_names_it(
    spoil: Any, message: str, strict: bool, copy: Path
) -> None:
    spoil(copy)
    options = {"ckpt_path": str(copy), "strict_resume": strict}
    outcomes = run_workers(partial(train, **options), copy.parent, workers=2, check=False)
    for outcome in outcomes:
        assert outcome.error == "CheckpointError"
        assert outcome.message.startswith(f"{copy} {message}")


@pytest.mark.parametrize(("before", "after"), [(NESTEROV, ADAM), (ADAM, NESTEROV)])
def test_another_optimizer_is_refused_with_the_reason(
    before: Any, after: Any, tmp_path: Path
) -> None:
    run_workers(partial(train, optimizer=before), tmp_path, workers=2)
    resume = partial(train, optimizer=after, ckpt_path="last")
    for outcome in run_workers(resume, tmp_path, workers=2, check=False):
        assert outcome.error == "CheckpointError"
        assert f"do not fit {after.func.__name__} (KeyError: " in outcome.message


class CachedByName(TorchCheckpointIO):
    """Keeps what it read by the name of the file, as torch does with the web's."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self.cache / f"{os.environ['RANK']} {Path(path).name}"
        if not kept.exists():
            shutil.copy(path, kept)
        return super().load_checkpoint(kept, *args, **kwargs)


def resume_both(rank: int, one: Path, two: Path, cache: Path) -> Any:
    def resume(path: Path, **options: Any) -> Any:
        seen: list[Any] = []
        module = Net(NESTEROV)
        module.on_train_batch_start = lambda *_: seen or seen.append(weights(module)["w"].tolist())
        strategy = EASGDStrategy(tau=4, strict_resume=True, **options)
        trainer(2, strategy, max_epochs=3).fit(module, Resumable(rank, STEPS), ckpt_path=path)
        return seen

    storage = CachedByName(cache)
    resume(one, checkpoint_io=storage)
    (cache / f"{rank} last.ckpt").unlink()
    return resume(two, checkpoint_io=storage), resume(two)


def test_files_known_by_their_names_are_never_another_checkpoints(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    run_workers(partial(train, optimizer=partial(NESTEROV, lr=0.02)), tmp_path, workers=2)
    paths = str(saved / "last.ckpt"), str(tmp_path / "last.ckpt")
    for cached, plain in run_workers(resume_both, *paths, tmp_path / "cache", workers=2):
        assert cached == plain


def resume_and_listen(rank: int, path: str, strict: bool) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*fresh optimizers")
        try:
            train(rank, Path(path).parent, ckpt_path=path, strict_resume=strict)
        except CheckpointError as error:
            return str(error)
    return [str(w.message) for w in caught if "fresh optimizers" in str(w.message)]


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_of_another_save_under_this_ones_name_is_noticed(
    strict: bool, copy: Path, tmp_path: Path
) -> None:
    run_workers(train, tmp_path / "other", workers=2)
    (mine,) = copy.parent.glob("last.ckpt.workers/*-1.ckpt")
    (other,) = tmp_path.glob("other/last.ckpt.workers/*-1.ckpt")
    shutil.copy(other, mine)
    said, also = run_workers(resume_and_listen, str(copy), strict, workers=2)
    text = f"{mine} is that of worker 1 in save {other.name[:12]}, not of 1 in {mine.name[:12]}"
    if strict:
        assert text in said
        assert text in also
    else:
        assert said == [f'Worker 1 starts at the center, with fresh optimizers: "{text}".']


def read_alone(rank: int, path: str) -> None:
    strategy = EASGDStrategy(tau=4)
    assert strategy.load_checkpoint(path)["lightning_easgd"]["workers"] == 2
    fitting = trainer(2, strategy)
    module = Net(NESTEROV)
    fitting.fit(module, Resumable(rank, STEPS))
    if rank == 1:
        assert strategy.load_checkpoint(path)["global_step"] == 12
    during = []
    module.on_train_batch_start = lambda *_: during.append(
        rank == 1 and strategy.load_checkpoint(path)["epoch"]
    )
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, Resumable(rank, STEPS))
    assert during == [rank == 1 and 1] * STEPS
    assert strategy._persistence.resumed is None


def test_reading_a_checkpoint_where_lightning_restores_none_is_reading_it(saved: Path) -> None:
    run_workers(read_alone, str(saved / "last.ckpt"), workers=2, timeout=30)


def one_worker(rank: int, folder: Path) -> Any:
    def fit(path: Any = None, callbacks: Any = ()) -> Any:
        module = Net(NESTEROV)
        torch.manual_seed(3)
        fitting = trainer(
            1,
            EASGDStrategy(tau=4, strict_resume=True),
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            max_epochs=2,
        )
        fitting.fit(module, Resumable(0, STEPS), ckpt_path=path)
        return weights(module)["w"].tolist(), torch.rand(1).item()

    whole = fit(callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)])
    return whole, fit(str(folder / "step=5.ckpt"))


def test_one_worker_alone_has_one_file_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    ((whole, resumed),) = run_workers(one_worker, tmp_path, workers=1)
    assert whole == resumed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=10.ckpt", "step=5.ckpt"]
    module = Net(NESTEROV)
    content = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    own = content["lightning_easgd"]["own"]["weights"]["tensors"]["w"]
    assert not torch.equal(own, content["state_dict"]["w"])
    plain = pl.Trainer(accelerator="cpu", devices=1, logger=False, max_epochs=1)
    plain.test(module, Resumable(0, 1), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert torch.equal(module.w, content["state_dict"]["w"])
