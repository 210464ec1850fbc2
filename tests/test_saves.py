"""Saves that fail, are killed or queued, and folders that hold more than ours or are not shared."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from saving import SGD, STEPS, files, require_whole, save_of, train
from staying import run_workers
from toy import Toy

from lightning_easgd.checkpoint.files import remove_debris, remove_saves, worker_file
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=.last.. is set, but there is no last"),
    pytest.mark.filterwarnings("ignore:.*last.ckpt.workers is a link"),
]

LARGE = 2**20
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


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
        pytest.skip("needs to mount a tmpfs: run pytest as root, in a container with CAP_SYS_ADMIN")
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_workers(partial(train, epochs=3), folder, workers=2)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", ["-0.ckpt", "-1.ckpt", "last.ckpt"])
def test_what_a_killed_save_left_goes_and_the_newest_whole_checkpoint_goes_on(
    what: str, after: bool, queued: bool, tmp_path: Path, undisturbed: Any
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
    assert resumed == undisturbed


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


def test_a_folder_that_another_worker_removes_meanwhile_has_nothing_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listed = tmp_path / "run" / "last.ckpt", []
    (tmp_path / "run" / "last.ckpt.workers").mkdir(parents=True)
    names = os.listdir

    def vanishes(folder: str) -> list[str]:
        os.rmdir(folder)
        listed.append(os.path.basename(folder))
        return names(folder)

    monkeypatch.setattr(os, "listdir", vanishes)
    remove_saves(AtomicCheckpointIO(), str(path), lambda save: True)
    remove_debris(AtomicCheckpointIO(), str(path))
    assert listed == ["last.ckpt.workers", "run"]


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


class Anything:
    """Of a kind that is not read without unpickling."""


@pytest.mark.parametrize("damaged", [False, True])
def test_debris_goes_beside_a_main_file_that_holds_any_object_and_stays_beside_a_damaged_one(
    damaged: bool, tmp_path: Path
) -> None:
    path, (old, new) = tmp_path / "last.ckpt", ("0123456789ab", "ba9876543210")
    content = {"hyper_parameters": Anything(), "lightning_easgd": {"format": 3, "save": old}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    if damaged:
        path.write_bytes(path.read_bytes()[:-100])
    for save in (old, new):
        AtomicCheckpointIO().save_checkpoint({}, worker_file(path, save, 1))
    remove_debris(AtomicCheckpointIO(), str(path))
    left = {file.name for file in (tmp_path / "last.ckpt.workers").iterdir()}
    assert left == {f"{old}-1.ckpt"} | ({f"{new}-1.ckpt"} if damaged else set())
