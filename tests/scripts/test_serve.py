"""scripts/serve.py: a center that can be killed, its table, and its keys."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
from served import LAYOUT, constant, free_ports, values
from waiting import until

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
import serve
from forking import FORK
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from pages import Page
from processes import Workers, run_workers
from rich.console import Console
from serving import COLUMNS, Shown, Watched, table, to_tensorboard, together

from lightning_easgd.server import Limits, Settings
from lightning_easgd.server.certificates import Certificates
from lightning_easgd.server.client import CenterClient
from lightning_easgd.server.form import Form
from lightning_easgd.server.grpc_transport import GrpcTransport
from lightning_easgd.server.model import byte_size
from lightning_easgd.server.serving import Serving
from lightning_easgd.server.sharded import ShardedClient

pytestmark = pytest.mark.timeout(150)

SCRIPT = Path(serve.__file__)


class Server:
    """serve.py in a process of its own, which is forked at once and waits to be started."""

    def __init__(self) -> None:
        asked, self._asked = FORK.Pipe(duplex=False)
        said, says = os.pipe()
        self._said = os.fdopen(said)
        self.group = Workers(_be_server, asked, says, workers=1)
        asked.close()
        os.close(says)
        self.pid = self.group.processes[0].pid

    def start(self, folder: Path, *arguments: str) -> Server:
        self._asked.send([str(SCRIPT), f"folder={folder}", *arguments])
        said = self._said.readline()
        found = re.match(r"serving on port (\d+)", said)
        assert found, said + self._said.read()
        self.port = int(found[1])
        return self

    def wait(self) -> str:
        """Until it has ended; what was wrong, if anything."""
        return self.group.collect(60)[0].message

    def end(self, number: signal.Signals) -> str:
        os.kill(self.pid, number)
        return self.wait()

    def close(self) -> None:
        with self.group:
            self._asked.close()
            self._said.close()


def _be_server(_: int, asked: Any, says: int) -> None:
    for stream in (1, 2):
        os.dup2(says, stream)
    sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))
    sys.argv = asked.recv()
    warnings.resetwarnings()  # not errors, as in tests
    runpy.run_path(str(SCRIPT), run_name="__main__")


KILLED = "was killed by signal 9 (out of memory? see dmesg)"


@pytest.fixture
def servers() -> Iterator[Iterator[Server]]:
    """As many as a test needs, forked before it speaks gRPC, whose threads are not forked."""
    with ExitStack() as stack:
        yield iter([stack.enter_context(closing(Server())) for _ in range(3)])


def reach(port: int, certificates: Certificates | None = None) -> CenterClient:
    transport = GrpcTransport(f"127.0.0.1:{port}", certificates=certificates)
    return CenterClient(transport, "0", LAYOUT, incarnation=1, patience=60)


def test_a_killed_server_goes_on_and_a_worker_notices_only_that_it_waits(
    tmp_path: Path, servers: Iterator[Server]
) -> None:
    server = next(servers).start(tmp_path, "address=127.0.0.1:0", "seconds=0.5")
    client, sent = reach(server.port), 0
    client.join(constant(0.0))
    for _ in range(2):
        for _ in range(200):
            sent += 1
            assert client.add(constant(1.0))[0].sequence == sent
        assert server.end(signal.SIGKILL) == KILLED
        at = f"address=127.0.0.1:{server.port}"
        server = next(servers).start(tmp_path, at, "seconds=0.5")
    client.add(constant(1.0))
    version, center = client.get()
    client.close()
    assert version == sent + 1
    np.testing.assert_array_equal(values(center), version)  # nothing twice, and nothing is lost
    assert server.end(signal.SIGTERM) == ""
    last = Serving(Settings(), tmp_path)
    (worker,) = last.handler.server.workers(last.handler.server.version).values()
    assert (worker.adds, worker.missing) == (version, 0)
    last.close()


def test_a_primary_that_stood_still_acknowledges_nothing_when_it_is_back(
    tmp_path: Path, servers: Iterator[Server]
) -> None:
    options = ("address=127.0.0.1:0", "lease=1")
    primary = next(servers).start(tmp_path / "primary", *options)
    at = f"127.0.0.1:{primary.port}"
    standby = next(servers).start(tmp_path / "standby", *options, f"standby_of={at}")
    transport = GrpcTransport([at, f"127.0.0.1:{standby.port}"])
    client = CenterClient(transport, "0", LAYOUT, incarnation=1, patience=60)
    client.join(constant(0.0))
    for _ in range(5):  # the client waits for an answer by what answers took
        client.add(constant(1.0))
    standing = tmp_path / "primary" / "standing.json"
    while not json.loads(standing.read_text())["standby"]:
        client.add(constant(1.0))
    os.kill(primary.pid, signal.SIGSTOP)
    try:
        for _ in range(20):
            client.add(constant(1.0))
    finally:
        os.kill(primary.pid, signal.SIGCONT)
    old = CenterClient(GrpcTransport(at), "1", LAYOUT, patience=1)
    with pytest.raises(ConnectionError, match="waits for its standby"):
        old.join(constant(0.0))
    old.close()
    sent = client.add(constant(1.0))[0].sequence
    version, center = client.get()
    client.close()
    assert version == sent
    np.testing.assert_array_equal(values(center), sent)
    assert standby.end(signal.SIGTERM) == primary.end(signal.SIGTERM) == ""


def test_servers_of_one_center_start_and_end_as_one(
    tmp_path: Path, servers: Iterator[Server]
) -> None:
    options = (f"address=127.0.0.1:{free_ports(2)}", "shards=2")

    def reach_all(server: Server) -> ShardedClient:
        def reach(shard: int) -> GrpcTransport:
            return GrpcTransport(f"127.0.0.1:{server.port + shard}")

        return ShardedClient(reach, "0", LAYOUT, incarnation=1)

    for sent in (0, 1):
        server = next(servers).start(tmp_path, *options)
        client = reach_all(server)
        assert client.join(constant(0.0)).version == sent
        receipt, center = client.add(constant(1.0), fetch=True)
        client.close()
        assert receipt.version == sent + 1
        np.testing.assert_array_equal(values(center), sent + 1)
        if not sent:
            assert server.end(signal.SIGKILL) == KILLED  # and its servers end, too
    lines = tmp_path / "served.jsonl"
    until(lambda: lines.exists() and lines.read_text().endswith("\n"), 60)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    *_, last = children.read_text().split()
    os.kill(int(last), signal.SIGKILL)
    assert server.wait().startswith("error: The server of shard 1 has ended. The others end, too")
    look = json.loads(lines.read_text().splitlines()[-1])
    assert look["versions"] == [2, 2]
    assert (tmp_path / "center-000000000002.safetensors").exists()
    assert (tmp_path / "shard-1" / "center-000000000001.safetensors").exists()


def test_servers_are_shown_as_one() -> None:
    def look(version: int, *rows: tuple[str, int, int]) -> dict[str, Any]:
        named = ("worker", "exchanges", "staleness")
        rest = {"per_second": 1.0, "mb_in_per_second": 2.0, "mb_out_per_second": 3.0}
        rest |= {"missing": 0, "silent_seconds": 0.5}
        return {
            **{"serves": True, "standby": None, "time": 1.0, "version": version, "alpha": 0.5},
            **{"model_bytes": 10, "refused": {"malformed": version}},
            "workers": [
                {**dict(zip(named, row, strict=True)), **rest, "distance": 3.0 + i}
                for i, row in enumerate(rows)
            ],
        }

    one = together([look(7, ("a", 4, 1)), look(5, ("b", 1, 0), ("a", 3, 2))])
    a, b = one["workers"]
    assert (a["worker"], a["exchanges"], a["staleness"], a["distance"]) == ("a", 3, 2, 5.0)
    assert (b["exchanges"], a["mb_in_per_second"], one["model_bytes"]) == (1, 4.0, 20)
    assert a["mb_out_per_second"] == 6.0
    assert (one["version"], one["refused"]) == (5, {"malformed": 12})
    screen = Console(file=io.StringIO(), width=120)
    screen.print(table(one))
    assert "center after 5 to 7 differences, α = 0.5, 2 shards" in screen.file.getvalue()


def test_keys_let_a_site_in_and_out(
    tmp_path: Path, servers: Iterator[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    serve.make_keys([str(keys), "server", "site-a"])
    assert f"site-a: give it {keys}/authority.pem, {keys}/site-a.pem" in capsys.readouterr().out
    server = next(servers).start(tmp_path / "center", "address=0.0.0.0:0", f"keys={keys}")
    names = ("authority.pem", "site-a.pem", "site-a.key")
    client = reach(server.port, Certificates(*(keys / name for name in names)))
    client.join(constant(0.0))
    serve.make_keys([str(keys), "--shut-out", "site-a"])
    assert "shut out at once: site-a" in capsys.readouterr().out
    client.patience = 0.1
    with pytest.raises(ConnectionError, match="'site-a' was shut out"):
        client.get()
    client.close()
    assert server.end(signal.SIGINT) == ""


def test_what_workers_may_ask_is_limited_by_keys(tmp_path: Path) -> None:
    given = ["address=127.0.0.1:0", "most_workers=3", "most_bytes=9000", "most_per_second=50"]
    options = serve.read([f"folder={tmp_path}", *given, "adds=2", "seconds=1000"])
    serving = serve.start(options, 0)
    assert serving.handler.server.settings.limits == Limits(3, 9000, 50)
    client = reach(serving.port)
    client.join(constant(0.0))
    for _ in range(2):
        client.add(constant(1.0))
    until((tmp_path / "center-000000000002.safetensors").exists)
    client.close()
    serving.close()


def test_the_table_shows_who_is_there(tmp_path: Path) -> None:
    serving = Serving(Settings(beta=0.5), tmp_path)
    shown = Watched(serving)
    assert shown.look()["workers"] == []
    client = reach(serving.port)
    client.join(constant(0.0))
    client.add(constant(0.5))
    look = json.loads(json.dumps(shown.look()))
    (row,) = look["workers"]
    assert (row["worker"], row["exchanges"], row["staleness"], row["missing"]) == ("0", 1, 0, 0)
    assert row["distance"] == pytest.approx(627**0.5)
    form = Form("int8", {})
    client.add(constant(0.0), form, fetch=True)
    (row,) = shown.look()["workers"]
    assert row["per_second"] > 0
    sizes = form.byte_size(LAYOUT), byte_size(LAYOUT)
    assert sizes[0] < sizes[1] / 2
    found = row["mb_in_per_second"], row["mb_out_per_second"]
    assert found == pytest.approx([1e-6 * row["per_second"] * size for size in sizes])
    screen = Console(file=io.StringIO(), width=120)
    screen.print(table(look))
    screen.print(table({**look, "standby": "silent"}))
    screen.print(table({**look, "serves": False}))
    assert (look["serves"], look["standby"]) == (True, None)
    said = screen.file.getvalue()
    assert said.count("center after 1 differences, α = 0.5") == 3
    assert "α = 0.5, standby silent" in said
    assert "standby: center" in said
    client.close()
    serving.close()


def test_tensorboard_has_what_the_table_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install -e '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = dict.fromkeys(COLUMNS, 1.5) | {"worker": "site [a]/0"}
    look = {"time": 5.0, "alpha": 0.3, "serves": True, "standby": None, "refused": {"malformed": 2}}
    with Shown(tmp_path / "served.jsonl", to_tensorboard(tmp_path / "board")) as shown:
        for version in (4, 9):
            shown.show({**look, "version": version, "workers": [row]})
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    points = [(each.wall_time, each.step, each.value) for each in read.Scalars("center/refused")]
    assert points == [(5.0, 4, 2.0), (5.0, 9, 2.0)]
    assert [each.value for each in read.Scalars("staleness/site [a]/0")] == [1.5, 1.5]
    assert len((tmp_path / "served.jsonl").read_text().splitlines()) == 2


def test_without_tensorboard_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[tensorboard\]'"):
        to_tensorboard(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["beta=2"], "beta=2 is not allowed"),
        (["address=0.0.0.0:0"], "with certificates"),
        (["keys=nowhere"], "No such file"),
        (["workers=some"], "workers='some' is not allowed"),
        (["workers=[1"], "workers=\\[1 cannot be read"),
        (["tauu=3"], "There is no key tauu. Did you mean tau?"),
        (["--tau", "3"], "--tau cannot be read. Write KEY=VALUE"),
        (["journal=maybe"], "journal='maybe' is not allowed"),
        (["lease=0"], "lease"),
        (["adds=0"], "adds=0 is not allowed"),
        (["most_bytes=0"], "most_bytes=0 is not allowed"),
        (["most_per_second=-1"], "most_per_second=-1 is not allowed"),
        (["worker_lease=0"], "worker_lease=0 is not allowed. Allowed: a positive number"),
        (["momentum=0.5"], "momentum=0.5 is not allowed. Allowed: null, or with algorithm=mdown"),
        (["algorithm=mdownpour", "momentum=1"], "momentum=1 is not stable"),
        (["shards=0"], "shards=0 is not allowed"),
        (["shard=2/2"], "shard='2/2' is not allowed. Allowed: as 0/2 and 1/2"),
        (["shard=1"], "shard='1' is not allowed"),
        (["shards=2", "address=localhost:0"], "address='localhost:0' is not allowed"),
        (["shards=2", "address=localhost:1", "max_norm=1"], "max_norm=1 is not allowed"),
        (["alone=true", "standby_of=localhost:1"], "alone=True is not allowed"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", f"folder={tmp_path}", *arguments])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit, match=said) as ended:
        serve.main()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    assert str(ended.value).startswith("error: ")
    assert len(str(ended.value).splitlines()) == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]


def test_help_has_every_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    serve.main()
    said = capsys.readouterr().out
    for key in vars(serve.read([])):
        assert f"\n  {key}=" in said
    assert max(map(len, said.splitlines())) < 125


def commands(page: str) -> list[list[str]]:
    """The arguments of serve.py on a page."""
    text = Page(f"docs/{page}.md").text
    found = re.findall(r"^python scripts/serve\.py (.*?)(?:  #.*)?$", text, re.M)
    return [command.split() for command in found]


def test_the_commands_of_the_page_are_read() -> None:
    served = [arguments for arguments in commands("serving") if arguments[0] != "keys"]
    assert len(served) >= 3
    for arguments in served:
        serve.read(arguments)


def test_on_the_pages_keys_are_made_before_a_server_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in ("asynchronous", "serving"):
        keyed = [arguments for arguments in commands(page) if "center-keys" in " ".join(arguments)]
        assert keyed[0] == ["keys", "center-keys", "server", "site-a", "site-b"]
    monkeypatch.chdir(tmp_path)
    alone, keys, together = commands("asynchronous")
    assert serve.read(alone).keys is None
    serve.make_keys(keys[1:])
    options = serve.read([*together, "address=0.0.0.0:0"])
    serve.start(options, 0).close()


def fit_as_the_page_says(rank: int, example: str) -> None:
    options = {"max_steps": 20, "logger": False, "enable_checkpointing": False}
    lightning.pytorch.Trainer = partial(lightning.pytorch.Trainer, **options)
    names: dict[str, Any] = {}
    exec(example, names)
    names["trainer"].fit(BoringModel(), BoringDataModule())


def test_the_worker_of_the_page_meets_the_server_of_the_page(
    tmp_path: Path, servers: Iterator[Server]
) -> None:
    command = commands("asynchronous")[0][1:]
    server = next(servers).start(tmp_path, *command, "address=127.0.0.1:0")
    (example,) = Page("docs/asynchronous.md").code("python")
    assert '"127.0.0.1:5700"' in example
    run_workers(fit_as_the_page_says, example.replace("5700", str(server.port)), workers=1)
    assert server.end(signal.SIGTERM) == ""
    *_, last = sorted(path.stem for path in tmp_path.glob("center-*.safetensors"))
    assert int(last.removeprefix("center-")) == 2  # τ is 10


def test_addresses_are_read_as_they_are_written() -> None:
    read = serve.read(["address=[::1]:5700", "standby_of=10:20", "keys=null", "workers=4"])
    assert (read.address, read.standby_of, read.keys, read.workers) == (
        *("[::1]:5700", "10:20", None, 4),
    )


def test_momentum_and_lease_of_workers_reach_the_server() -> None:
    read = serve.read(["algorithm=mdownpour", "momentum=0.5", "worker_lease=7", "lease=3"])
    settings = serve.settings_of(read, 0)
    assert (vars(settings.rule)["momentum"], settings.lease, read.lease) == (0.5, 7, 3)
    assert vars(serve.settings_of(serve.read(["algorithm=mdownpour"]), 0).rule)["momentum"] == 0.9


def test_a_server_goes_on_where_its_table_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    look = {"version": 1, "workers": []}
    with Shown(tmp_path / "gone" / "served.jsonl") as shown:
        shown.show(look)
        shown.show(look)
        assert caplog.text.count("is not written to") == 1
        (tmp_path / "gone").mkdir()
        shown.show(look)
    assert json.loads((tmp_path / "gone" / "served.jsonl").read_text()) == look
