"""A served center is saved again and again, goes on after a kill, and lets nobody in who is out."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import LAYOUT, constant, values
from waiting import until

from lightning_easgd.server import Refused, Settings, SnapshotError
from lightning_easgd.server.client import CenterClient, UnreachableError

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
from lightning_easgd.server.certificates import ShutOut
from lightning_easgd.server.grpc_transport import GrpcTransport
from lightning_easgd.server.keys import make_certificates
from lightning_easgd.server.serving import Pairing, Serving

pytestmark = pytest.mark.timeout(60)


def reach(port: int, worker: str = "0", **options: Any) -> CenterClient:
    certificates = options.pop("certificates", None)
    transport = GrpcTransport(f"127.0.0.1:{port}", certificates=certificates)
    return CenterClient(transport, worker, LAYOUT, **{"patience": 20.0, **options})


def snapshots(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def test_a_server_goes_on_where_it_ended(tmp_path: Path) -> None:
    for begin in (0, 3, 6):
        serving = Serving(Settings(), tmp_path)
        client = reach(serving.port, incarnation=begin + 1)
        assert client.join(constant(0.0)).version == begin
        for _ in range(3):
            client.add(constant(1.0))
        client.close()
        serving.close()
    assert snapshots(tmp_path)[-1] == "center-000000000009.safetensors"
    serving = Serving(Settings(), tmp_path)
    np.testing.assert_array_equal(values(serving.handler.server.delivered()), 9.0)
    serving.close()


@pytest.mark.parametrize("due", [{"adds": 2}, {"seconds": 0.2}], ids=str)
def test_snapshots_are_saved_when_they_are_due(tmp_path: Path, due: dict[str, Any]) -> None:
    serving = Serving(Settings(), tmp_path, **due)
    client = reach(serving.port)
    client.join(constant(0.0))
    for _ in range(2):
        client.add(constant(1.0))
    until(lambda: "center-000000000002.safetensors" in snapshots(tmp_path))
    client.close()
    serving.close()


def test_a_snapshot_that_cannot_be_saved_is_logged_and_workers_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "center"
    serving = Serving(Settings(), folder, adds=1)
    (folder / "center-000000000001.safetensors.part").mkdir()  # in the way
    client = reach(serving.port)
    client.join(constant(0.0))
    with caplog.at_level(logging.ERROR):
        client.add(constant(1.0))
        until(lambda: "000000000001.safetensors cannot be written" in caplog.text)
    client.add(constant(1.0))
    until(lambda: "center-000000000002.safetensors" in snapshots(folder))
    client.close()
    serving.close()


def test_what_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    first = Serving(Settings(), tmp_path / "first")
    client = reach(first.port)
    client.join(constant(0.0))
    client.close()
    with pytest.raises(SnapshotError, match="Another server writes"):
        Serving(Settings(), tmp_path / "first")
    with pytest.raises(OSError, match="cannot listen"):
        Serving(Settings(), tmp_path / "second", address=f"127.0.0.1:{first.port}")
    with pytest.raises(ValueError, match="with certificates"):
        Serving(Settings(), tmp_path / "second", pairing=Pairing("elsewhere:5700"))
    first.close()
    with pytest.raises(SnapshotError, match="algorithm=easgd"):
        Serving(Settings(algorithm="downpour"), tmp_path / "first")
    Serving(Settings(), tmp_path / "first").close()
    Serving(Settings(), tmp_path / "second").close()
    assert not [each for each in threading.enumerate() if each.name.startswith("center-")]


def test_whatever_fails_at_its_end_a_server_saves_and_lets_go_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(Settings(), tmp_path)
    client = reach(serving.port)
    client.join(constant(0.0))
    client.add(constant(1.0))
    client.close()
    close = serving._grpc.close

    def fails() -> None:
        close()
        raise RuntimeError("it fails")

    monkeypatch.setattr(serving._grpc, "close", fails)
    with pytest.raises(RuntimeError, match="it fails"):
        serving.close()
    assert not serving._saver.is_alive()
    assert snapshots(tmp_path)[-1] == "center-000000000001.safetensors"
    Serving(Settings(), tmp_path).close()


def test_an_error_at_a_snapshot_is_logged_and_the_next_one_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(Settings(), tmp_path, adds=1)
    client = reach(serving.port)
    client.join(constant(0.0))
    with monkeypatch.context() as patch:
        patch.setattr(serving._folder, "save", lambda _: os.stat(tmp_path / "nothing"))
        client.add(constant(1.0))
        until(lambda: "No snapshot was saved: [Errno 2]" in caplog.text)
    client.add(constant(1.0))
    until(lambda: "center-000000000002.safetensors" in snapshots(tmp_path))
    client.close()
    serving.close()


def test_without_its_folder_a_server_acknowledges_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, moved = tmp_path / "center", tmp_path / "moved"
    serving = Serving(Settings(), folder)
    client = reach(serving.port)
    client.join(constant(0.0))
    client.add(constant(1.0))
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    client.patience = 0.1
    with pytest.raises(UnreachableError, match="it was removed"):
        client.add(constant(1.0))
    assert "was refused for the 1. time: The difference was not added" in caplog.text
    with pytest.raises(SnapshotError, match="cannot be written"):
        serving.save()
    moved.rename(folder)
    client.patience = 20.0
    serving.save()
    client.resend()
    np.testing.assert_array_equal(values(serving.handler.server.delivered()), 2.0)
    client.close()
    serving.close()
    assert "center-000000000002.safetensors" in snapshots(folder)


def test_who_is_shut_out_is_out_at_once(tmp_path: Path) -> None:
    shown = {name: make_certificates(tmp_path / "keys", name) for name in ("server", "a", "b")}
    out = tmp_path / "keys" / "shut_out.txt"
    serving = Serving(
        Settings(), tmp_path / "center", certificates=shown["server"], shut_out=ShutOut(out)
    )
    clients = [
        reach(serving.port, name, certificates=shown[name], patience=0.1) for name in ("a", "b")
    ]
    for client in clients:
        client.join(constant(0.0))
        client.add(constant(1.0))
    out.write_text("somebody\na\n")
    with pytest.raises(UnreachableError, match="permission_denied, 'a' was shut out"):
        clients[0].add(constant(1.0))
    clients[1].add(constant(1.0))
    np.testing.assert_array_equal(values(serving.handler.server.delivered()), 3.0)
    for client in clients:
        client.close()
    serving.close()


def test_workers_train_on_while_a_server_is_replaced(tmp_path: Path) -> None:
    """Closed and started again at its port, five times, while two workers send."""
    serving, stop, sent = Serving(Settings(), tmp_path), threading.Event(), [0, 0]
    port = serving.port

    def work(worker: int) -> None:
        client = reach(port, f"{worker}")
        client.join(constant(0.0))
        while not stop.is_set():
            client.add(constant(1.0), fetch=True)
            sent[worker] += 1
        client.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        before = sum(sent)
        until(lambda before=before: sum(sent) > before + 5)
        serving.close()
        serving = Serving(Settings(), tmp_path, address=f"127.0.0.1:{port}")
    stop.set()
    for thread in threads:
        thread.join(30)
    server = serving.handler.server
    np.testing.assert_array_equal(values(server.delivered()), sum(sent))
    assert [worker.missing for worker in server.workers(time.monotonic()).values()] == [0, 0]
    serving.close()


def test_another_model_is_refused_after_a_restart(tmp_path: Path) -> None:
    serving = Serving(Settings(), tmp_path)
    client = reach(serving.port)
    client.join(constant(0.0))
    client.close()
    serving.close()
    assert snapshots(tmp_path) == ["center-000000000000.safetensors"]
    serving = Serving(Settings(), tmp_path)
    from lightning_easgd.center.flat import FlatLayout

    other = FlatLayout(
        (slot.name, constant(0.0).views[place][..., :1]) for place, slot in enumerate(LAYOUT.slots)
    )
    client = CenterClient(GrpcTransport(f"127.0.0.1:{serving.port}"), "1", other)
    with pytest.raises(Refused, match="'weight', has the shape"):
        client.join(constant(0.0, other))
    client.close()
    serving.close()
