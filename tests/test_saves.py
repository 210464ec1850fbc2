"""Saves that fail, are killed or queued, and folders that hold more than ours or are not shared."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from processes import run_workers
from toy import Resumable, Toy, trainer, weights

from lightning_easgd import EASGDStrategy
from lightning_easgd.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.. is set, but there is no last"),
    pytest.mark.filterwarnings("ignore:.*last.ckpt.workers is a link"),
]

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
STEPS = 6
LARGE = 2**20
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def train(
    rank: int,
    folder: Path,
    *,
    module: Any = None,
    name: str = "last",
    epochs: int = 2,
    storage: Any = None,
    ckpt_path: Any = "last",
    strict: bool = True,
    **saving: Any,
) -> Any:
    """Train on, saving last.ckpt after every third step."""
    saving = {"every_n_train_steps": 3, "enable_version_counter": False} | saving
    strategy = EASGDStrategy(
        tau=4, exchange_timeout=10, strict_resume=strict, checkpoint_io=storage
    )
    fitting = trainer(
        2,
        strategy,
        callbacks=[ModelCheckpoint(folder, name, **saving)],
        enable_checkpointing=True,
        max_epochs=epochs,
    )
    torch.manual_seed(0)
    module = module or Toy(SGD)
    fitting.fit(module, Resumable(rank, STEPS), ckpt_path=ckpt_path)
    return weights(module)["w"].tolist()


def files(folder: Path) -> dict[str, int]:
    """Sizes of the files in a folder, by their paths in it."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


def save_of(folder: Path) -> str:
    return torch.load(folder / "last.ckpt", weights_only=True)["lightning_easgd"]["save"]


def require_whole(folder: Path, step: int | None = None) -> None:
    """That last.ckpt is whole, of this step, and that nothing else is there."""
    save = save_of(folder)
    parts = {f"last.ckpt.workers/{save}-{rank}.ckpt" for rank in range(2)}
    assert files(folder).keys() == {"last.ckpt", *parts}
    assert step in (None, torch.load(folder / "last.ckpt", weights_only=True)["global_step"])


class Wide(Toy):
    """Of 8 MB, so that files are as large as their tensors."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.wide = torch.nn.Parameter(torch.zeros(LARGE, dtype=torch.float64))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.wide.sum() * 1e-6


def wide(rank: int, folder: Path, epochs: int) -> Any:
    return train(rank, folder, module=Wide(), epochs=epochs)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of half a gigabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(disk: Path, size: float) -> None:
    subprocess.run(["mount", "-o", f"remount,size={int(size)}", str(disk)], check=True)


@needs_root
def test_a_full_disk_leaves_the_checkpoint_before_and_saves_again_when_there_is_room(
    disk: Path,
) -> None:
    run_workers(wide, disk, 1, workers=2)
    before = files(disk)
    one = sum(before.values())
    for room in (1.15, 1.4, 1.75, 1.95):
        resize(disk, one * room)
        outcomes = run_workers(wide, disk, 2, workers=2, check=False)
        for outcome in outcomes:
            assert outcome.error in ("OSError", "CheckpointError")
            assert "No space left on device" in outcome.message
            assert str(disk / "last.ckpt") in outcome.message
        assert files(disk) == before
    resize(disk, one * 2.1)
    for epochs in (2, 3):
        run_workers(wide, disk, epochs, workers=2)
        require_whole(disk, epochs * STEPS)


class Deadly(AtomicCheckpointIO):
    """Ends all processes of a run when a file of this name is written for the n-th time."""

    def __init__(self, what: str, after: bool, count: int) -> None:
        self.what, self.after, self.count = what, after, count

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        here = str(path).endswith(self.what)
        self.count -= here
        if here and self.count == 0 and not self.after:
            Path(f"{path}.{'0' * 16}.part").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, storage_options)
        if here and self.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", ["-0.ckpt", "-1.ckpt", "last.ckpt"])
def test_what_a_killed_save_left_goes_and_the_newest_whole_checkpoint_goes_on(
    what: str, after: bool, queued: bool, tmp_path: Path
) -> None:
    deadly = Deadly(what, after, count=3)
    storage = AsyncCheckpointIO(deadly) if queued else deadly
    run = partial(train, epochs=3, storage=storage)
    outcomes = run_workers(run, tmp_path, workers=2, check=False, timeout=40)
    assert any(outcome.error is not None for outcome in outcomes)
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert step == 9 if (what, after) == ("last.ckpt", True) else step <= 9
    resumed = run_workers(partial(train, epochs=3), tmp_path, workers=2)
    require_whole(tmp_path, 3 * STEPS)
    assert resumed == run_workers(partial(train, epochs=3), tmp_path / "whole", workers=2)


class Slow(AtomicCheckpointIO):
    """Takes its time on one worker; a plugin's queue grows meanwhile."""

    def __init__(self, who: int, seconds: float) -> None:
        self.who, self.seconds = who, seconds

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if os.environ["RANK"] == str(self.who):
            time.sleep(self.seconds)
        super().save_checkpoint(checkpoint, path, storage_options)


SAVING = {
    "replaced": {"name": "last"},
    "top 1": {"name": "{step}", "monitor": "step", "mode": "max", "save_top_k": 1},
    "top 2": {"name": "{step}", "monitor": "step", "mode": "max", "save_top_k": 2},
    "both": {
        "name": "{step}",
        "monitor": "step",
        "mode": "max",
        "save_top_k": 1,
        "save_last": True,
    },
}


def queued(rank: int, folder: Path, who: int, saving: dict[str, Any]) -> Any:
    storage = AsyncCheckpointIO(Slow(who, 0.05))
    saving = {"every_n_train_steps": 1, **saving}
    ended = train(rank, folder, storage=storage, ckpt_path=None, **saving)
    found = sorted(str(path.name) for path in folder.glob("*.ckpt"))
    return ended, found


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("saving", SAVING.values(), ids=SAVING)
def test_what_is_removed_or_replaced_waits_for_the_writes_that_are_queued(
    saving: dict[str, Any], who: int, tmp_path: Path
) -> None:
    (_, one), (_, two) = run_workers(queued, tmp_path, who, saving, workers=2)
    last = {"last.ckpt"} if saving["name"] == "last" or "save_last" in saving else set()
    newest = {f"step={step}.ckpt" for step in range(13 - saving.get("save_top_k", 1), 13)}
    expected = last | (newest if "monitor" in saving else set())
    assert set(one) == set(two) == expected
    for name in expected:
        content = torch.load(tmp_path / name, weights_only=True)
        save = content["lightning_easgd"]["save"]
        parts = {path.name for path in (tmp_path / f"{name}.workers").iterdir()}
        assert parts == {f"{save}-0.ckpt", f"{save}-1.ckpt"}
        path = str(tmp_path / name)
        resume = partial(train, ckpt_path=path, epochs=3)
        run_workers(resume, tmp_path / "resumed" / name, workers=2)


def fit_twice(rank: int, folder: Path) -> Any:
    """Begins a second fit from files whose writing one worker takes time for."""
    storage = AsyncCheckpointIO(Slow(0, 0.1))
    train(rank, folder, epochs=1, storage=storage, ckpt_path=None)
    return train(rank, folder, epochs=2, storage=storage)


def test_who_ends_a_fit_waits_until_all_is_written(tmp_path: Path) -> None:
    resumed = run_workers(fit_twice, tmp_path, workers=2)
    assert resumed == run_workers(train, tmp_path / "whole", workers=2)


class Broken(AtomicCheckpointIO):
    def __init__(self, who: int) -> None:
        self.who = who

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if os.environ["RANK"] == str(self.who):
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def broken(rank: int, folder: Path, who: int) -> None:
    train(rank, folder, storage=AsyncCheckpointIO(Broken(who)), ckpt_path=None)


@pytest.mark.parametrize("who", [0, 1])
def test_a_queued_write_that_fails_ends_all_and_leaves_no_main_file(
    who: int, tmp_path: Path
) -> None:
    outcomes = run_workers(broken, tmp_path, who, workers=2, check=False, timeout=40)
    assert outcomes[who].error == "OSError"
    assert outcomes[1 - who].error in ("CheckpointError", "ExchangeError")
    for outcome in outcomes:
        assert "No space left on device" in outcome.message
    assert not (tmp_path / "last.ckpt").exists()


def test_files_of_others_and_what_lies_behind_links_stay(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run" / "last.ckpt.workers", tmp_path / "elsewhere"
    for place in (folder / "mine", folder / f"{'a' * 12}-7.ckpt", elsewhere):
        place.mkdir(parents=True)
    kept = [
        folder / "notes.txt",
        folder / "mine" / f"{'a' * 12}-0.ckpt",
        folder / "aaaa-0.ckpt",
        folder / f"{'a' * 12}-0.ckpt.bak",
        folder / f"{'a' * 12}-7.ckpt" / "notes.txt",
        elsewhere / f"{'a' * 12}-0.ckpt",
        tmp_path / "run" / "last.ckpt.mine.part",
    ]
    for path in kept:
        path.write_text("precious")
    (folder / f"{'a' * 12}-1.ckpt").symlink_to(elsewhere / f"{'a' * 12}-0.ckpt")
    gone = [
        folder / f"{'a' * 12}-0.ckpt",
        folder / f"{'a' * 12}-0.ckpt.{'0' * 16}.part",
        tmp_path / "run" / f"last.ckpt.{'0' * 16}.part",
    ]
    for path in gone:
        path.write_text("cut short")
    run_workers(partial(train, ckpt_path=None), tmp_path / "run", workers=2)
    assert all(path.read_text() == "precious" for path in kept)
    assert not any(path.exists() for path in gone)
    ours = [path for path in folder.iterdir() if path.name.startswith(save_of(tmp_path / "run"))]
    assert len(ours) == 2


class Shared(LocalFileSystem):
    """A file system that is remote for all who go by the scheme of its paths."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return super()._strip_protocol(str(path).removeprefix("shared://"))


def remote(rank: int, folder: str, epochs: int) -> Any:
    fsspec.register_implementation("shared", Shared, clobber=True)
    return train(rank, folder, epochs=epochs)  # type: ignore[arg-type]


def test_remote_folders_hold_the_same_and_are_resumed_from(tmp_path: Path) -> None:
    for epochs in (1, 2):
        resumed = run_workers(remote, f"shared://{tmp_path}/run", epochs, workers=2)
        require_whole(tmp_path / "run", epochs * STEPS)
    assert resumed == run_workers(train, tmp_path / "whole", workers=2)


def linked(rank: int, folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*is a link")
        train(rank, folder, ckpt_path=None)
    return [str(w.message) for w in caught if "is a link" in str(w.message)]


def test_a_folder_that_is_a_link_is_written_to_and_never_removed_from(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{'a' * 12}-0.ckpt").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt.workers").symlink_to(elsewhere)
    said, nothing = run_workers(linked, tmp_path / "run", workers=2)
    assert nothing == []
    assert len(said) == 1
    assert f"{tmp_path / 'run' / 'last.ckpt.workers'} is a link" in said[0]
    assert (elsewhere / f"{'a' * 12}-0.ckpt").read_text() == "precious"
    assert (elsewhere / f"{save_of(tmp_path / 'run')}-1.ckpt").exists()
    resume = partial(train, ckpt_path="last", epochs=3)
    run_workers(resume, tmp_path / "run", workers=2)


def on_its_own_disk(rank: int, who: int, folder: Path, queued: bool) -> Any:
    """One worker has another folder of this name, as on a machine that does not share it."""
    if rank == who:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, None) == 0
    try:
        train(rank, folder, storage=AsyncCheckpointIO() if queued else None)
    except RuntimeError as error:
        return type(error).__name__, str(error), files(folder)
    return None


@needs_root
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("who", [0, 1])
def test_a_folder_that_is_not_shared_is_noticed_by_the_first_save(
    who: int, queued: bool, tmp_path: Path
) -> None:
    outcomes = run_workers(on_its_own_disk, who, tmp_path, queued, workers=2, timeout=50)
    for error, message, left in outcomes:
        assert error in ("CheckpointError", "ExchangeError")
        assert "does not see what worker 1" in message
        assert os.uname().nodename in message
        assert str(tmp_path / "last.ckpt.workers") in message
        assert queued or not left
