"""Snapshots: whole or not there, damaged ones are said, and a full disk takes nothing along."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import LAYOUT, random_vector

from lightning_easgd.server import CenterServer, Settings, Snapshot, SnapshotError

pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
from lightning_easgd.server import snapshots
from lightning_easgd.server.snapshots import SnapshotFolder


def served(adds: int) -> CenterServer:
    server = CenterServer(Settings(algorithm="mdownpour", center_average="polyak"))
    server.join("0", 1, LAYOUT, now=0, weights=random_vector(0))
    for sequence in range(1, adds + 1):
        server.add("0", 1, sequence, random_vector(sequence), now=0)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SnapshotFolder]:
    opened = SnapshotFolder(tmp_path / "center")
    yield opened
    opened.close()


def names(folder: SnapshotFolder) -> list[str]:
    return sorted(os.listdir(folder.path))


def same(one: Snapshot | None, other: Snapshot) -> bool:
    assert one is not None
    assert one.facts == other.facts
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in other.tensors)


def test_what_was_saved_is_loaded_and_the_last_ones_are_kept(folder: SnapshotFolder) -> None:
    assert folder.load() is None
    for adds in range(4):
        snapshot = served(adds).snapshot()
        assert folder.save(snapshot).name == names(folder)[-1]
        assert same(folder.load(), snapshot)
    assert names(folder) == ["center-000000000002.safetensors", "center-000000000003.safetensors"]


def test_a_server_that_is_restored_from_a_file_goes_on_bit_for_bit(folder: SnapshotFolder) -> None:
    server, twin = served(3), served(0)
    folder.save(server.snapshot())
    loaded = folder.load()
    assert loaded is not None
    twin.restore(loaded, now=0)
    assert twin.add("0", 1, 3, random_vector(3), now=0).version == 3  # it has that
    for each in (server, twin):
        each.add("0", 1, 4, random_vector(4), now=0)
    for one, other in ((server.delivered(), twin.delivered()), (served(4).delivered(),) * 2):
        assert one.checksum() == other.checksum()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_damaged_is_noticed_and_the_one_before_is_used(
    folder: SnapshotFolder, seed: int
) -> None:
    luck, before = random.Random(seed), served(1).snapshot()
    folder.save(before)
    path = folder.save(served(2).snapshot())
    content = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del content[luck.randrange(len(content)) :]
    else:
        content[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"center-000000000002\.safetensors is damaged"):
        loaded = folder.load()
    assert same(loaded, before)
    assert names(folder) == [
        "center-000000000001.safetensors",
        "center-000000000002.safetensors.damaged",
    ]


def test_if_all_are_damaged_nothing_begins_anew(folder: SnapshotFolder) -> None:
    folder.save(served(1).snapshot()).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(SnapshotError, match=r"All snapshots in .* are damaged: center-0+1"),
    ):
        folder.load()


def test_a_file_of_a_later_version_is_not_read(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "FORMAT", 2)
    folder.save(served(1).snapshot())
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="a later version of lightning-easgd wrote it"),
        pytest.raises(SnapshotError),
    ):
        folder.load()


def test_two_servers_do_not_share_a_folder(folder: SnapshotFolder) -> None:
    with pytest.raises(SnapshotError, match="Another server writes its snapshots to"):
        SnapshotFolder(folder.path)


def test_what_a_killed_server_was_writing_is_removed(tmp_path: Path) -> None:
    left, others = tmp_path / "center-000000000009.safetensors.part", tmp_path / "mine.part"
    left.touch()
    others.touch()
    SnapshotFolder(tmp_path).close()
    assert (left.exists(), others.exists()) == (False, True)


@pytest.mark.multiprocess
def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("needs to mount a tmpfs: run pytest as root, in a container with CAP_SYS_ADMIN")
    try:
        folder = SnapshotFolder(place)
        before = served(1).snapshot()
        folder.save(before)
        ballast = place / "ballast"
        free = os.statvfs(place)
        ballast.write_bytes(bytes((free.f_bavail - 1) * free.f_bsize))
        with pytest.raises(SnapshotError, match=r"cannot be written: .*[Nn]o space left"):
            folder.save(served(2).snapshot())
        assert names(folder) == ["ballast", "center-000000000001.safetensors"]
        assert same(folder.load(), before)
        ballast.unlink()
        folder.save(served(2).snapshot())
        folder.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def test_without_safetensors_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, snapshots.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[async\]'"):
        importlib.import_module(snapshots.__name__)
