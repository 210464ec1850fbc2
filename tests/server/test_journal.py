"""The journal: whatever was acknowledged is there again, wherever a server was cut off."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from served import LAYOUT, constant, random_vector

from lightning_easgd.center.flat import FlatLayout
from lightning_easgd.server import CenterServer, Refusal, Refused, Settings, Snapshot

pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
from lightning_easgd.server import journal
from lightning_easgd.server.journal import Journal, remove_journals, replay_journals
from lightning_easgd.server.snapshots import SnapshotFolder

SMALL = FlatLayout([("weight", torch.empty(3)), ("bias", torch.empty(2, dtype=torch.float64))])
OPTIONS: dict[str, Any] = {"staleness": "scale", "weight": "samples", "max_norm": 2.0}


class Kept:
    """A server with a journal in a folder, as a process has it."""

    def __init__(self, path: Path, layout: FlatLayout = SMALL, **options: Any) -> None:
        self.folder = SnapshotFolder(path)
        self.journal = Journal(self.folder)
        self.server = CenterServer(Settings(**options), self.journal)
        self.layout = layout
        if snapshot := self.folder.load():
            self.server.restore(snapshot, now=0)
        self.again = replay_journals(self.folder, self.server, now=0)
        self.journal.follow(self.server.version)

    def join(self, worker: str = "0") -> None:
        self.server.join(worker, 1, self.layout, now=0, weights=random_vector(0, self.layout))

    def add(self, sequence: int, worker: str = "0") -> None:
        difference = random_vector(sequence, self.layout)
        self.server.add(worker, 1, sequence, difference, now=0, samples=float(1 + sequence % 3))

    def snapshot(self) -> None:
        """As the server does it."""
        snapshot = self.server.snapshot()
        self.journal.follow(self.server.version)
        self.folder.save(snapshot)
        remove_journals(self.folder)

    def kill(self) -> None:
        """Leave the files as they are."""
        assert self.journal._file is None or not os.close(self.journal._file)
        self.folder.close()

    def close(self) -> None:
        self.journal.close()
        self.folder.close()


def bits(snapshot: Snapshot) -> tuple[Any, ...]:
    tensors = {name: tensor.numpy().tobytes() for name, tensor in snapshot.tensors.items()}
    return snapshot.facts, tensors


def journals(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if ".journal" in name)


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_disks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(journal, "_STEP", 2**14)  # or each reading goes through 64 MiB of zeros
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "center"


@pytest.mark.parametrize(
    "options",
    [{}, OPTIONS, {"algorithm": "mdownpour", "center_average": "polyak"}, {"beta": 0.5}],
    ids=str,
)
def test_a_killed_server_goes_on_with_the_same_bits(path: Path, options: dict[str, Any]) -> None:
    kept, twin = Kept(path, LAYOUT, **options), CenterServer(Settings(**options))
    for worker in "ab":
        kept.join(worker)
        twin.join(worker, 1, LAYOUT, now=0, weights=random_vector(0))
    luck = random.Random(0)
    for turn in range(24):
        worker, sequence = "ab"[turn % 2], 1 + turn // 2
        kept.add(sequence, worker)
        samples = float(1 + sequence % 3)
        twin.add(worker, 1, sequence, random_vector(sequence), now=0, samples=samples)
        if luck.random() < 0.2:
            kept.snapshot()
        if luck.random() < 0.3:
            version = kept.server.version
            kept.kill()
            kept = Kept(path, LAYOUT, **options)
            assert kept.server.version == version
            for name in "ab":
                kept.join(name)
                kept.server.get(name, 1, now=0)
                twin.get(name, 1, now=0)
    assert bits(kept.server.snapshot())[1] == bits(twin.snapshot())[1]
    for name, worker in kept.server.workers(0).items():
        same = twin.workers(0)[name]
        assert (worker.receipt, worker.adds, worker.missing) == (same.receipt, same.adds, 0)
    kept.close()


def test_a_retry_of_what_a_killed_server_acknowledged_is_not_added_again(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    kept.add(1)
    center = kept.server.delivered()
    kept.kill()
    kept = Kept(path)
    kept.add(1)
    assert kept.server.version == 1
    assert kept.server.delivered().checksum() == center.checksum()
    kept.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[int]]:
    """A folder with three records after its snapshot, where each ends, and each center."""
    path = tmp_path_factory.mktemp("written") / "center"
    kept = Kept(path)
    kept.join()
    ends, centers = [0], [kept.server.delivered().checksum()]
    for sequence in (1, 2, 3):
        kept.add(sequence)
        ends.append(kept.journal.bytes)
        centers.append(kept.server.delivered().checksum())
    kept.close()
    return path, ends, centers


@pytest.mark.parametrize("rest", [b"", bytes(100)], ids=["", "room that was taken"])
def test_cut_off_at_every_byte(
    tmp_path: Path, written: tuple[Path, list[int], list[int]], rest: bytes
) -> None:
    """What was whole is there, and what was not is dropped without a word."""
    source, ends, centers = written
    content = (source / "center-000000000000.journal").read_bytes()
    assert len(content) == ends[-1]
    opened, folder = SnapshotFolder(source), SnapshotFolder(tmp_path)
    snapshot = opened.load()
    assert snapshot
    for cut in range(len(content) + 1):
        (tmp_path / "center-000000000000.journal").write_bytes(content[:cut] + rest)
        server = CenterServer()
        server.restore(snapshot, now=0)
        whole = sum(end <= cut for end in ends) - 1
        assert replay_journals(folder, server, now=0) == whole
        assert server.delivered().checksum() == centers[whole]
    opened.close()
    folder.close()


@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("record", range(4))
def test_after_a_cut_the_server_goes_on(
    path: Path, written: tuple[Path, list[int], list[int]], record: int, off: int
) -> None:
    source, ends, _ = written
    shutil.copytree(source, path)
    cut = min(max(0, ends[record] + off), ends[-1])
    os.truncate(path / "center-000000000000.journal", cut)
    kept = Kept(path)
    whole = sum(end <= cut for end in ends) - 1
    assert kept.server.version == whole
    kept.add(whole + 1)
    kept.kill()
    kept = Kept(path)
    assert kept.server.version == whole + 1
    kept.close()


@pytest.mark.parametrize("seed", range(40))
def test_damage_before_the_last_record_is_said_and_put_aside(
    path: Path, written: tuple[Path, list[int], list[int]], seed: int
) -> None:
    source, ends, centers = written
    shutil.copytree(source, path)
    file, luck = path / "center-000000000000.journal", random.Random(seed)
    content = bytearray(file.read_bytes())
    place = luck.randrange(ends[2])
    content[place] ^= 1 << luck.randrange(8)
    file.write_bytes(content)
    whole = sum(end <= place for end in ends) - 1
    with pytest.warns(
        UserWarning, match=rf"is damaged at byte {ends[whole]}, .*after difference {whole};"
    ):
        kept = Kept(path)
    assert kept.server.delivered().checksum() == centers[whole]
    kept.add(whole + 1)
    kept.kill()
    kept = Kept(path)
    assert kept.server.version == whole + 1
    kept.close()


def test_a_journal_that_is_written_over_is_cut_off_anywhere(path: Path) -> None:
    """What it had before is skipped, and is no damage."""
    kept = Kept(path)
    kept.join()
    for sequence in range(1, 7):
        kept.add(sequence)
        if sequence in (4, 5, 6):
            kept.snapshot()
    before = (path / "spare.journal").read_bytes()[:2000]
    ends = []
    for sequence in (7, 8, 9):
        kept.add(sequence)
        ends.append(kept.journal.bytes)
    newest = path / "center-000000000006.journal"
    assert not (path / "spare.journal").exists()
    after = newest.read_bytes()[: 2 * ends[-1]]
    kept.kill()
    folder = SnapshotFolder(path)
    snapshot = folder.load()
    assert snapshot
    for cut in [*range(0, ends[-1], 11), *ends]:
        mixed = after[:cut] + before[cut:]
        newest.write_bytes(mixed)
        pairs = enumerate(zip(mixed, after, strict=False))
        alike = next((place for place, (one, other) in pairs if one != other), len(mixed))
        server = CenterServer()
        server.restore(snapshot, now=0)
        assert replay_journals(folder, server, now=0) == sum(end <= alike for end in ends)
    folder.close()


def test_a_damaged_snapshot_loses_nothing(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    for sequence in range(1, 7):
        kept.add(sequence)
        if sequence in (2, 4):
            kept.snapshot()
    assert journals(path) == ["center-000000000002.journal", "center-000000000004.journal"]
    kept.kill()
    newest = path / "center-000000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        again = Kept(path)
    assert (again.again, again.server.version) == (4, 6)
    assert bits(again.server.snapshot()) == bits(kept.server.snapshot())
    again.close()


def test_a_journal_whose_forerunner_is_missing_is_said(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    kept.add(1)
    kept.journal.follow(1)
    kept.add(2)
    kept.close()
    (path / "center-000000000000.journal").unlink()
    with pytest.warns(UserWarning, match="Difference 2 of worker '0' does not follow center 0"):
        kept = Kept(path)
    assert kept.server.version == 0
    assert journals(path) == ["center-000000000001.journal.damaged"]
    kept.close()


def test_a_journal_of_another_version_is_said_and_put_aside(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    kept.add(1)
    kept.close()
    journal = path / "center-000000000000.journal"
    journal.write_bytes(b"EAJ1" + journal.read_bytes()[4:])
    with pytest.warns(UserWarning, match="Another version of this package wrote it"):
        kept = Kept(path)
    assert kept.server.version == 0
    assert journals(path) == ["center-000000000000.journal.damaged"]
    kept.close()


def test_journals_without_a_snapshot_are_said(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    kept.add(1)
    kept.close()
    (path / "center-000000000000.safetensors").unlink()
    with pytest.warns(UserWarning, match="has no center yet"):
        kept = Kept(path)
    assert not kept.server.has_center
    kept.close()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("needs to mount a tmpfs: run pytest as root, in a container with CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def fill(kept: Kept, disk: Path) -> int:
    """Have a server fill its disk; the sequence that has no room."""
    kept.add(1)
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    for sequence in range(2, 100):
        with suppress(Refused):
            kept.add(sequence)
        if kept.server.version < sequence:
            return sequence
    raise AssertionError("the disk is not full")


@pytest.mark.multiprocess
def test_a_full_disk_refuses_what_it_cannot_keep_and_has_it_asked_again(full: Path) -> None:
    kept = Kept(full, LAYOUT)
    kept.join()
    sequence = fill(kept, full)
    with pytest.raises(Refused, match=r"was not added: the journal .*No space left") as refused:
        kept.add(sequence)
    assert refused.value.reason is Refusal.NOT_KEPT
    assert not refused.value.reason.ends
    before = kept.server.delivered().checksum()
    assert kept.server.version == sequence - 1
    (full / "ballast").unlink()
    kept.kill()
    kept = Kept(full, LAYOUT)
    assert (kept.server.version, kept.server.delivered().checksum()) == (sequence - 1, before)
    kept.add(sequence)
    kept.close()


@pytest.mark.multiprocess
def test_a_center_that_cannot_be_kept_is_not_begun(full: Path) -> None:
    kept = Kept(full, LAYOUT)
    free = os.statvfs(full)
    (full / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    with pytest.raises(Refused, match=r"The center cannot be kept\. The snapshot"):
        kept.join()
    assert not kept.server.has_center
    (full / "ballast").unlink()
    kept.join()
    kept.close()


def test_what_is_refused_is_not_in_the_journal(path: Path) -> None:
    kept = Kept(path, LAYOUT)
    kept.join()
    with pytest.raises(Refused, match="not finite"):
        kept.server.add("0", 1, 1, constant(float("nan")), now=0)
    assert kept.journal.bytes == 0
    kept.close()


def test_nothing_is_acknowledged_into_a_journal_that_was_removed(path: Path) -> None:
    kept = Kept(path)
    kept.join()
    kept.add(1)
    (path / "center-000000000000.journal").unlink()
    with pytest.raises(Refused, match=r"cannot be written \(it was removed") as refused:
        kept.add(2)
    assert refused.value.reason is Refusal.NOT_KEPT
    kept.snapshot()
    kept.add(2)
    kept.kill()
    kept = Kept(path)
    assert kept.server.version == 2
    kept.close()
