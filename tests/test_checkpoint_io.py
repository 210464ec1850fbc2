"""Files that are whole or absent, under any storage that the user chooses."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_workers

from lightning_easgd import EASGDStrategy
from lightning_easgd.checkpoint.ordered_writes import Write
from lightning_easgd.strategy.checkpoint_io import AtomicCheckpointIO, ordered_writes

LARGE = 2**20


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("limit", [64, LARGE // 2, LARGE])
def test_a_write_that_fails_says_why_and_leaves_what_was_there(
    limit: int, before: bool, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    if before:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with no_more_than(limit), pytest.raises(OSError, match="not saved") as raised:
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(LARGE, dtype=torch.uint8)}, path)
    assert raised.value.errno == errno.EFBIG
    assert os.strerror(errno.EFBIG) in str(raised.value)
    assert raised.value.filename == str(path)
    assert os.listdir(tmp_path) == ["last.ckpt"] * before
    if before:
        assert torch.load(path) == {"step": 1}


def test_what_cannot_be_pickled_keeps_its_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "last.ckpt")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("called", ["mkdir", "open"])
def test_a_folder_that_another_worker_removes_meanwhile_is_made_again(
    called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "last.ckpt.workers", []
    folder.mkdir()
    call = getattr(os, called)

    def late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1 and called == "open":
            folder.rmdir()
        try:
            return call(*arguments)
        finally:
            if len(calls) == 1 and called == "mkdir":
                folder.rmdir()

    monkeypatch.setattr(os, called, late)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, folder / "0.ckpt")
    assert torch.load(folder / "0.ckpt") == {"step": 1}
    assert len(calls) > 1


def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    path = tmp_path / "last.ckpt"
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    for name in ("last.ckpt", "last.ckpt.part"):
        (tmp_path / name).symlink_to(precious)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    (tmp_path / f"last.ckpt.{'0' * 16}.part").symlink_to(precious)
    with pytest.raises(FileExistsError):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert precious.read_text() == "keep"
    assert torch.load(path) == {"step": 1}
    assert not path.is_symlink()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address at which ``tmp_path`` is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


class Sly:
    def __reduce__(self) -> Any:
        return os.putenv, ("EASGD_WAS_HERE", "1")


def load_from_the_web(rank: int, web: str, chosen: Any) -> Any:
    strategy = EASGDStrategy(checkpoint_io=chosen)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        strategy.load_checkpoint(f"{web}/sly.ckpt")
    return AtomicCheckpointIO().load_checkpoint(f"{web}/sly.ckpt", weights_only=False)


# In processes of their own: fsspec's thread for the web stays.
@pytest.mark.parametrize("chosen", [None, TorchCheckpointIO(), AsyncCheckpointIO()])
def test_nothing_from_the_web_is_unpickled_unless_the_user_says_so(
    chosen: Any, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    torch.save({"sly": Sly()}, tmp_path / "sly.ckpt")
    assert run_workers(load_from_the_web, web, chosen, workers=1) == [{"sly": None}]


def load_anew(rank: int, web: str, folder: Path) -> None:
    for step, name in enumerate(("one", "two", "one")):
        path = folder / name / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)
        assert AtomicCheckpointIO().load_checkpoint(f"{web}/{name}/last.ckpt") == {"step": step}
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(f"{web}/three/last.ckpt")


def test_the_web_is_read_anew_by_the_whole_address(web: str, tmp_path: Path) -> None:
    run_workers(load_anew, web, tmp_path, workers=1)


class OwnIO(TorchCheckpointIO):
    pass


def trainer_with(io: Any, strategy: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, plugins=[io], logger=False)


@pytest.mark.parametrize("strategy", ["easgd", EASGDStrategy])
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (OwnIO, [OwnIO]),
        (AsyncCheckpointIO, [AsyncCheckpointIO, AtomicCheckpointIO]),
        (
            lambda: AsyncCheckpointIO(AsyncCheckpointIO()),
            [AsyncCheckpointIO, AsyncCheckpointIO, AtomicCheckpointIO],
        ),
        (lambda: AsyncCheckpointIO(OwnIO()), [AsyncCheckpointIO, OwnIO]),
    ],
    ids=["own", "async", "nested", "async own"],
)
def test_a_plugin_of_the_trainer_is_used_and_wraps_our_own(
    make: Any, kinds: list[type], strategy: Any
) -> None:
    made = strategy if isinstance(strategy, str) else strategy(tau=4)
    storage = trainer_with(make(), made).strategy.checkpoint_io
    found = [storage]
    while hasattr(found[-1], "checkpoint_io"):
        found.append(found[-1].checkpoint_io)
    assert [type(each) for each in found] == kinds


def test_a_plugin_beside_a_storage_of_the_strategy_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="checkpoint_io set through both"):
        trainer_with(AsyncCheckpointIO(), EASGDStrategy(checkpoint_io=OwnIO()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda io: pickle.loads(pickle.dumps(io))])
def test_a_plugin_whose_writes_are_ordered_is_copied_without_the_order(
    copied: Any, tmp_path: Path
) -> None:
    plugin, seen = AsyncCheckpointIO(AtomicCheckpointIO()), []
    writes = ordered_writes(plugin)
    twin = copied(plugin)
    assert type(twin.checkpoint_io) is AtomicCheckpointIO
    twin.save_checkpoint({"value": 1}, tmp_path / "twin")
    writes.save({"value": 2}, str(tmp_path / "own"), None, Write(after=lambda: seen.append(1)))
    for each in (plugin, twin):
        each.teardown()
    assert [torch.load(tmp_path / name)["value"] for name in ("twin", "own")] == [1, 2]
    assert seen == [1]


class Choosy(AsyncCheckpointIO):
    """A plugin that raises before it queues, once."""

    refuses = True

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.refuses:
            self.refuses = False
            raise ConnectionError("no answer")
        super().save_checkpoint(*args, **kwargs)


def test_a_write_that_a_plugin_raised_before_is_not_taken_for_the_next(tmp_path: Path) -> None:
    plugin, seen = Choosy(AtomicCheckpointIO()), []
    writes, path = ordered_writes(plugin), str(tmp_path / "last")
    for name in ("first", "second"):
        write = Write(
            before=partial(seen.append, f"before {name}"),
            failed=partial(seen.append, f"{name} failed"),
            after=partial(seen.append, f"after {name}"),
        )
        write.over.append(partial(seen.append, f"{name} over"))
        try:
            writes.save({"value": name}, path, None, write)
        except ConnectionError:
            seen.append("raised")
    plugin.teardown()
    assert seen == [
        *("first failed", "first over", "raised"),
        *("before second", "after second", "second over"),
    ]
    assert torch.load(path)["value"] == "second"
    assert writes.queued == 0
