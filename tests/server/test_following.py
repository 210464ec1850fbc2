"""A standby has all that was acknowledged, takes over, and is the only one that answers then."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import LAYOUT, constant, random_vector, values
from waiting import until

from lightning_easgd.algorithms import MDownpour
from lightning_easgd.server import Refusal, Refused, Settings, SnapshotError
from lightning_easgd.server.answers import LostError
from lightning_easgd.server.client import CenterClient, UnreachableError

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
from lightning_easgd.server.frames import cut
from lightning_easgd.server.grpc_transport import GrpcTransport
from lightning_easgd.server.keys import make_certificates
from lightning_easgd.server.serving import Pairing, Serving

pytestmark = pytest.mark.timeout(60)

LEASE = 0.4


class Pair:
    """A primary and its standby, each with a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.settings = folder, Settings(**options)
        self.started: list[Serving] = []
        self._clients: list[CenterClient] = []
        self.primary = self.start("primary")
        self.standby = self.start("standby", standby_of=f"127.0.0.1:{self.primary.port}")

    def start(self, name: str, port: int = 0, **pairing: Any) -> Serving:
        serving = Serving(
            self.settings,
            self.folder / name,
            address=f"127.0.0.1:{port}",
            pairing=Pairing(lease=LEASE, **pairing),
        )
        self.started.append(serving)
        return serving

    def client(self, *servers: Serving, **options: Any) -> CenterClient:
        servers = servers or (self.primary, self.standby)
        transport = GrpcTransport([f"127.0.0.1:{server.port}" for server in servers])
        client = CenterClient(transport, "0", LAYOUT, **{"patience": 20.0, **options})
        self._clients.append(client)
        return client

    def cut(self) -> None:
        """Let the standby hear nothing of its primary any more."""

        def nothing(*_: Any) -> Iterator[bytes]:
            raise LostError("the link is cut")

        assert self.standby.following
        self.standby.following._transport.call = nothing

    def abandon_standby(self) -> None:
        """Let it end without a word."""
        assert self.standby.following
        self.standby.following.follower.complete = False
        self.standby.close()

    def until_paired(self) -> None:
        assert self.standby.following
        follower = self.standby.following.follower
        until(lambda: follower.complete, 20)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for serving in self.started:
            if serving._saver.is_alive():
                serving.close()


def version(serving: Serving) -> int:
    return serving.handler.server.version


def center(serving: Serving) -> np.ndarray:
    return values(serving.handler.server.delivered())


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("algorithm", ["easgd", "mdownpour"])
def test_a_standby_has_what_was_acknowledged_and_takes_over(tmp_path: Path, algorithm: str) -> None:
    pair = Pair(tmp_path, algorithm=algorithm, center_average="polyak", staleness="scale")
    client = pair.client()
    client.join(random_vector(0))
    for sequence in range(1, 4):
        client.add(random_vector(sequence))
    pair.until_paired()
    for sequence in range(4, 10):
        receipt, _ = client.add(random_vector(sequence))
        assert version(pair.standby) >= receipt.version
    np.testing.assert_array_equal(center(pair.standby), center(pair.primary))
    pair.cut()
    receipt, _ = client.add(random_vector(10))
    assert (receipt.version, receipt.sequence) == (10, 10)
    assert version(pair.standby) == 10
    old = pair.client(pair.primary, patience=0.2)
    old._fence = 0
    for ask in (old.get, lambda: old.join(constant(0.0)), old.leave):
        with pytest.raises(UnreachableError, match="waits for its standby"):
            ask()
    pair.close()


def test_a_difference_that_the_standby_never_got_is_not_acknowledged(pair: Pair) -> None:
    client = pair.client()
    client.join(constant(0.0))
    pair.until_paired()
    pair.cut()
    acknowledged = 0

    def work() -> None:
        nonlocal acknowledged
        for _ in range(20):
            client.add(constant(1.0))
            acknowledged += 1

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(30)
    assert acknowledged == 20
    np.testing.assert_array_equal(center(pair.standby), 20)
    assert version(pair.primary) < 20


def test_a_standby_that_ends_lets_the_primary_go_on(pair: Pair) -> None:
    client = pair.client(pair.primary, patience=5.0)
    client.join(constant(0.0))
    pair.until_paired()
    client.add(constant(1.0))
    pair.standby.close()
    time.sleep(2 * LEASE)
    assert client.add(constant(1.0))[0].version == 2


def test_a_standby_that_is_started_again_is_brought_up_to_date(pair: Pair) -> None:
    client = pair.client(pair.primary, patience=5.0)
    client.join(constant(0.0))
    pair.until_paired()
    pair.abandon_standby()
    time.sleep(2 * LEASE)
    with pytest.raises(UnreachableError, match="waits for its standby"):
        pair.client(pair.primary, patience=0.2).get()
    pair.standby = pair.start("standby", standby_of=f"127.0.0.1:{pair.primary.port}")
    pair.until_paired()
    assert client.add(constant(1.0))[0].version == 1
    np.testing.assert_array_equal(center(pair.standby), 1.0)


def test_a_primary_that_is_started_again_waits_for_its_standby(pair: Pair) -> None:
    client = pair.client()
    client.join(constant(0.0))
    pair.until_paired()
    client.add(constant(1.0))
    pair.cut()
    until(lambda: pair.standby.handler.primary.standing.serves, 20)
    client.add(constant(1.0))
    pair.primary.close()
    again = pair.start("primary", pair.primary.port)
    with pytest.raises(UnreachableError, match="waits for its standby"):
        pair.client(again, patience=0.2).join(constant(0.0))
    again.close()
    again = pair.start("primary", standby_of=f"127.0.0.1:{pair.standby.port}")
    assert again.following
    follower = again.following.follower
    until(lambda: follower.complete, 20)
    assert client.add(constant(1.0))[0].version == 3
    np.testing.assert_array_equal(center(again), 3.0)


def test_folders_say_who_may_start_alone(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    client = pair.client()
    client.join(constant(5.0))
    pair.until_paired()
    pair.close()
    with pytest.raises(SnapshotError, match="of a standby that did not take over"):
        pair.start("standby")
    alone = pair.start("standby", alone=True)
    np.testing.assert_array_equal(center(alone), 5.0)
    pair.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(beta=0.5), "'beta': 0.9"),
        (Settings(MDownpour(0.5)), r"MDownpour\(.*momentum=0\.5"),
    ],
    ids=["beta", "momentum"],
)
def test_a_standby_with_other_settings_says_so(pair: Pair, settings: Settings, said: str) -> None:
    pair.standby.close()
    pair.settings = settings
    other = pair.start("other", standby_of=f"127.0.0.1:{pair.primary.port}")
    assert other.following
    following = other.following
    until(lambda: following.failed, 20)
    assert re.search(said, str(following.failed))


def test_only_a_server_may_follow_and_nonsense_is_refused(tmp_path: Path) -> None:
    shown = {name: make_certificates(tmp_path / "keys", name) for name in ("server", "site")}
    serving = Serving(
        Settings(),
        tmp_path / "center",
        certificates=shown["server"],
        pairing=Pairing(lease=LEASE),  # so long an answer may take
    )
    asked = {"name": "x", "have": -1, "run": "", "heard": None, "fence": 0, "ends": False}
    weird = [{**asked, name: value} for name in asked for value in (None, -2)]

    at = f"127.0.0.1:{serving.port}"
    transports = {
        name: GrpcTransport(at, certificates=each, follow=True) for name, each in shown.items()
    }

    def ask(name: str, text: dict[str, Any]) -> None:
        list(transports[name].call(cut(text), 10))

    with pytest.raises(LostError, match="is no server"):
        ask("site", asked)
    refused = 0
    for text in weird:
        try:
            ask("server", text)
        except LostError as error:
            refused += "no message of a standby" in str(error)
    assert refused > 8
    ask("server", asked)
    for transport in transports.values():
        transport.close()
    serving.close()


def test_a_standby_whose_disk_is_full_takes_over_from_nobody(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = pair.client()
    client.join(constant(0.0))
    client.add(constant(1.0))
    pair.until_paired()
    assert pair.standby.following

    def full(_: Any) -> None:
        raise Refused(Refusal.NOT_KEPT, "No space left")

    adding = threading.Thread(target=client.add, args=(constant(1.0),))
    with monkeypatch.context() as patch:
        patch.setattr("lightning_easgd.server.following._FULL", 0.1)
        patch.setattr(pair.standby.following._journal, "add", full)
        adding.start()
        until(lambda: caplog.text.count("until this standby has room: No space left") >= 3, 20)
    adding.join(20)
    assert not adding.is_alive()
    assert pair.primary.handler.primary.standing.serves
    assert not pair.standby.handler.primary.standing.serves
    np.testing.assert_array_equal(center(pair.standby), 2.0)
