"""EASGDStrategy(center=...): a trainer as one worker of a server, with all that Lightning does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from served import free_ports
from toy import Toy, initial_weights, loader, trainer, weights

from lightning_easgd import EASGD, CenterAt, EASGDMonitor, EASGDStrategy, Linear, MDownpour
from lightning_easgd.center.center import Center
from lightning_easgd.server import Refused, Settings
from lightning_easgd.workloads.report import _describe_strategy

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
pytest.importorskip("cryptography", reason="needs cryptography: pip install -e '.[async]'")
from lightning_easgd.server.keys import make_certificates
from lightning_easgd.server.serving import Serving
from lightning_easgd.strategy import at_server
from lightning_easgd.strategy.at_server import AtServer

pytestmark = pytest.mark.timeout(60)

SGD = partial(torch.optim.SGD, lr=0.05)
STEPS = 12


class Server:
    """A server in this process."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.serving = Serving(Settings(**{"tau": 3, **settings}), folder)
        self.address = f"127.0.0.1:{self.serving.port}"

    @property
    def version(self) -> int:
        return self.serving.handler.server.version

    @property
    def center(self) -> dict[str, np.ndarray]:
        vector = self.serving.handler.server.delivered()
        pairs = zip(vector.layout.names, vector.views, strict=True)
        return {name: view.double().numpy() for name, view in pairs}

    @property
    def there(self) -> list[str]:
        return list(self.serving.handler.server.workers(0.0))


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    """Lightning's launcher leaves variables for the processes that it starts."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "center")
    yield server
    server.serving.close()


class Watched(Toy):
    """Notes the weights in hooks."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.seen: dict[str, Any] = {}

    def note(self, where: str) -> None:
        self.seen[where] = weights(self)

    def on_train_batch_end(self, *_: Any) -> None:
        self.note("training")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validation")
        self.log("val_loss", self.training_step(batch, batch_idx))

    def on_validation_end(self) -> None:
        self.note("validation ends")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test")

    def on_train_end(self) -> None:
        self.note("end")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in ("w", "b"))


def fit(server: Server, module: pl.LightningModule, rank: int = 0, **options: Any) -> pl.Trainer:
    strategy = EASGDStrategy(center=server.address, **options.pop("strategy", {}))
    validated = options.pop("validated", None)
    fitting = trainer(1, strategy, **options)
    fitting.fit(module, loader(rank, STEPS), validated)
    return fitting


def test_a_worker_joins_trains_and_leaves_with_its_last_difference(server: Server) -> None:
    module = Watched()
    fitting = fit(server, module)
    telemetry = fitting.strategy.telemetry
    assert telemetry.exchanges == 4  # at 3, 6, 9, and the last
    assert server.version == telemetry.differences_added == 4
    assert telemetry.tau == 3
    assert telemetry.staleness == 0
    assert same(weights(module), server.center)
    assert same(module.seen["end"], server.center)
    assert not same(module.seen["training"], server.center)
    assert not server.there
    assert not torch.distributed.is_initialized()


def test_a_later_worker_starts_at_the_center_and_trains_it_on(server: Server) -> None:
    fit(server, Toy(SGD))
    after = server.center
    late = Watched()
    begins = {}
    late.on_train_start = lambda: begins.update(before=weights(late))
    late.on_train_batch_start = lambda *_: begins.setdefault("first", weights(late)) and None
    fit(server, late, rank=1)
    assert same(begins["before"], initial_weights())
    assert same(begins["first"], after)
    assert server.version == 8


def test_validation_checkpoints_and_tests_see_the_center(server: Server, tmp_path: Path) -> None:
    module = Watched()
    fitting = trainer(
        1,
        EASGDStrategy(center=server.address),
        max_epochs=2,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path / "saved", save_last=True, monitor="val_loss")],
    )
    seen = []
    module.on_validation_model_eval = lambda: (
        pl.LightningModule.on_validation_model_eval(module),
        server.version and seen.append(server.center),
    )
    fitting.fit(module, loader(0, STEPS), loader(9, 2))
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["state_dict"]
    assert same({name: value.numpy() for name, value in saved.items()}, seen[-1])
    assert same(module.seen["validation"], seen[-1])
    fitting.test(module, loader(9, 2), verbose=False)
    assert same(module.seen["test"], server.center)
    trainer(1, EASGDStrategy(center=server.address)).validate(module, loader(9, 2), verbose=False)
    assert server.version == 8


def test_after_a_validation_the_worker_is_itself_again(server: Server) -> None:
    module = Watched()
    fitting = trainer(1, EASGDStrategy(center=server.address), val_check_interval=4)
    before = {}
    module.on_validation_end = lambda: before.update(module.seen.get("training", {}))
    after = []
    module.on_train_batch_start = lambda batch, index: after.append((dict(before), weights(module)))
    fitting.fit(module, loader(0, STEPS), loader(9, 1))
    trained, begins = after[8]
    assert same(trained, begins)
    assert not same(module.seen["validation"], module.seen["training"])


def test_a_run_resumes_with_the_workers_own_weights(server: Server, tmp_path: Path) -> None:
    module, path, kept = Watched(), tmp_path / "seven.ckpt", {}

    def save(*args: Any) -> None:
        if args[2] == 6:
            kept.update(weights(module))
            fitting.save_checkpoint(path)

    module.on_train_batch_end = save
    fitting = trainer(1, EASGDStrategy(center=server.address))
    fitting.fit(module, loader(0, STEPS))
    again = Watched()
    first = {}
    again.on_train_batch_start = lambda *_: first.setdefault("x", weights(again)) and None
    on = trainer(1, EASGDStrategy(center=server.address))
    on.fit(again, loader(0, STEPS), ckpt_path=path)
    assert same(first["x"], kept)
    assert on.global_step == STEPS
    assert same(weights(again), server.center)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 5}, "tau=5 contradicts the server, which has tau=3"),
        ({"algorithm": "downpour"}, "algorithm='downpour' contradicts the server"),
        ({"center_average": "ema"}, "contradicts the server, which has center_average=None"),
    ],
)
def test_an_option_that_contradicts_the_server_is_refused(
    server: Server, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(server, Toy(SGD), strategy=options)
    assert not server.there or server.version == 0


def test_what_is_not_given_is_the_server_s_whatever_server_it_is(
    server: Server, tmp_path: Path
) -> None:
    other = Server(tmp_path / "other", algorithm="downpour", tau=2, center_average="polyak")
    strategy = EASGDStrategy(center=[other.address])
    module, fitting = Watched(), trainer(1, strategy)
    fitting.fit(module, loader(0, STEPS))
    assert other.version == 6
    assert same(weights(module), other.center)
    assert strategy.options.rule_name == "adownpour_async"
    for options in ({"overlap": True}, {"elastic_point": "iterate"}, {"algorithm": "easgd"}):
        (given,) = options
        with pytest.raises(ValueError, match=rf"{given}=.* (not possible|contradicts the server)"):
            fit(other, Toy(SGD), strategy=options)
    other.serving.close()
    object.__setattr__(strategy._given.center, "addresses", [server.address])
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader(0, STEPS))
    assert server.version == 4
    assert same(weights(module), server.center)
    described = _describe_strategy(fitting)
    assert described == {"strategy": "easgd_async", "rule": f"{EASGD()}", "strength": None}


def test_another_model_is_refused_by_the_name_of_its_parameter(server: Server) -> None:
    fit(server, Toy(SGD))
    with pytest.raises(Refused, match="parameter 0, 'w', has the dtype"):
        fit(server, Toy(SGD, dtype=torch.float32))


def test_a_server_that_is_not_there_is_an_error_in_time() -> None:
    strategy = EASGDStrategy(center="127.0.0.1:1", exchange_timeout=0.3)
    with pytest.raises(ConnectionError, match="No server answered worker"):
        trainer(1, strategy).fit(Toy(SGD), loader(0, 2))


class Unfreezing(BackboneFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        """Nothing, for the toy has no backbone."""


@pytest.mark.parametrize(
    ("callback", "said"), [(LearningRateFinder, "center of all"), (Unfreezing, "later")]
)
def test_what_would_move_the_center_of_all_is_refused(
    server: Server, callback: type[Callback], said: str
) -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=said):
        fit(server, Toy(SGD), callbacks=[callback()])
    assert server.version == 0


def test_an_exception_of_the_user_leaves_the_server_usable(server: Server) -> None:
    module = Toy(SGD)
    module.on_train_batch_end = lambda *args: 1 / 0 if args[2] == 5 else None
    with pytest.raises(ZeroDivisionError):
        fit(server, module)
    assert not server.there
    fit(server, Toy(SGD))


def test_early_stopping_ends_this_worker(server: Server) -> None:
    module = Watched()
    stops = EarlyStopping("val_loss", patience=0, mode="max")
    fitting = trainer(
        1, EASGDStrategy(center=server.address), max_epochs=9, callbacks=[stops, EASGDMonitor()]
    )
    fitting.fit(module, loader(0, STEPS), loader(9, 1))
    assert fitting.current_epoch < 9
    assert same(weights(module), server.center)


def test_downpour_and_eamsgd_train_at_a_server(tmp_path: Path) -> None:
    server = Server(tmp_path, algorithm="downpour", tau=2)
    module = Watched()
    fit(server, module, strategy={"algorithm": "downpour"})
    assert server.version == 6
    assert same(module.seen["training"], server.center)
    server.serving.close()


@pytest.mark.parametrize("given", [None, "polyak"])
def test_the_average_that_a_server_keeps_is_validated_saved_and_delivered(
    tmp_path: Path, given: str | None
) -> None:
    server = Server(tmp_path / "center", algorithm="downpour", tau=2, center_average="polyak")
    module = Watched()
    fitting = fit(
        server,
        module,
        strategy={"algorithm": "downpour", "center_average": given},
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path / "saved", save_last=True)],
        validated=loader(9, 1),
    )
    average, inner = server.center, server.serving.handler.server
    assert same(weights(module), average)
    assert same(module.seen["validation"], average)
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["state_dict"]
    assert same({name: value.numpy() for name, value in saved.items()}, average)
    center = fitting.strategy.center_state_dict()
    newest = torch.cat(inner.snapshot().tensors["center.float64"].split(1))
    assert torch.equal(torch.cat([center["w"].view(-1), center["b"]]), newest)
    assert not same({name: value.numpy() for name, value in center.items()}, average)
    server.serving.close()


def test_momentum_of_the_center_is_the_server_s(tmp_path: Path) -> None:
    server = Server(tmp_path / "center", algorithm=MDownpour(0.5), tau=1)
    module = Watched()
    with pytest.raises(ValueError, match="contradicts the server, which has algorithm=MDownpour"):
        fit(server, module, strategy={"algorithm": MDownpour(0.9)})
    fit(server, module, strategy={"algorithm": "mdownpour"})
    assert same(weights(module), server.center)
    assert server.version == STEPS
    server.serving.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_servers_with_a_slice_each_are_met_as_one(
    server: Server, tmp_path: Path, overlap: bool
) -> None:
    port = free_ports(3)
    shards = [
        Serving(
            Settings(tau=3, shard=shard, shards=3),
            tmp_path / f"{shard}",
            address=f"127.0.0.1:{port + shard}",
        )
        for shard in range(3)
    ]
    modules = [Watched(), Watched()]
    for address, module in zip((server.address, f"127.0.0.1:{port}"), modules, strict=True):
        strategy = EASGDStrategy(center=address, overlap=overlap)
        trainer(1, strategy).fit(module, loader(0, STEPS))
    assert same(*map(weights, modules))
    assert same(modules[0].seen["training"], modules[1].seen["training"])
    assert [each.handler.server.version for each in shards] == [server.version] * 3
    assert not any(each.handler.server.workers(0.0) for each in shards)
    for each in shards:
        each.close()


@pytest.mark.parametrize("tau", [Linear(1, 6, steps=6), lambda step: 1 + min(step, 5)])
def test_a_period_may_follow_a_schedule_of_the_worker(server: Server, tau: Any) -> None:
    module = Watched()
    fitting = fit(server, module, strategy={"tau": tau})
    telemetry = fitting.strategy.telemetry
    assert telemetry.exchanges == server.version == 4  # at 1, 3, 7, and the last
    assert same(weights(module), server.center)


def test_differences_travel_as_int8(server: Server) -> None:
    module = Watched()
    fitting = fit(server, module, strategy={"compression": "int8"})
    assert same(weights(module), server.center)
    telemetry = fitting.strategy.telemetry
    assert telemetry.exchanges == server.version == 4
    assert telemetry.bytes_sent == 3 * 260 + 8 * 8  # the last in full precision


@pytest.mark.parametrize("addresses", [[], "", 5, "host", ["127.0.0.1:1", 7]])
def test_addresses_are_checked(addresses: Any) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        EASGDStrategy(center=addresses)


def test_an_address_of_another_machine_needs_keys() -> None:
    with pytest.raises(ValueError, match="with certificates or"):
        EASGDStrategy(center="example.org:5700")
    with pytest.warns(UserWarning, match="can read and change the center"):
        EASGDStrategy(center=CenterAt("example.org:5700", insecure=True))


@pytest.mark.multiprocess
def test_workers_that_were_started_together_are_of_one_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificates(tmp_path, "site-a")
    (tmp_path / "authority.key").unlink()
    options = EASGDStrategy(center=CenterAt("server:5700", keys=tmp_path)).options
    told = json.dumps(["team", ["server:5700"], "site-b", [], "no checkpoint"])  # by worker 0
    monkeypatch.setattr(at_server, "share", lambda *_, **__: told)
    center = Center(Toy(SGD), buffers="average", rank=1)
    with pytest.raises(ValueError, match=r"keys='site-a' is not allowed.*\(site-b\)"):
        AtServer.ask(
            *(center, options),
            rank=1,
            workers=2,
            timeout=timedelta(seconds=1),
            folders=[],
            goes_on_from="no checkpoint",
        )


def test_a_server_that_is_killed_and_restarted_adds_every_difference_once(tmp_path: Path) -> None:
    def start(port: int) -> subprocess.Popen[str]:
        script = Path(__file__).parent.parent / "scripts" / "serve.py"
        options = [f"folder={tmp_path}", f"address=127.0.0.1:{port}", "tau=2"]
        command = [sys.executable, str(script), *options]
        served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert served.stdout is not None
        served.said = served.stdout.readline()
        return served

    servers = [start(0)]
    port = int(re.findall(r"port (\d+)", servers[0].said)[0])
    module, offline = Watched(), []

    def strike(*args: Any) -> None:
        if args[2] == 5:
            servers[0].kill()
        elif args[2] == 12:
            offline.append(fitting.strategy.telemetry.differences_added)
            servers.append(start(port))

    module.on_train_batch_end = strike
    fitting = trainer(1, EASGDStrategy(center=f"127.0.0.1:{port}"))
    try:
        fitting.fit(module, loader(0, 24))
        telemetry = fitting.strategy.telemetry
        assert fitting.global_step == 24
        assert offline[0] <= 3  # at 2 and 4, and perhaps one on its way
        assert offline[0] < telemetry.differences_added == telemetry.exchanges < 12
        servers[1].send_signal(signal.SIGTERM)
        servers[1].communicate(timeout=40)
        last = Serving(Settings(tau=2), tmp_path)
        assert last.handler.server.version == telemetry.differences_added
        vector = last.handler.server.delivered()
        center = dict(zip(vector.layout.names, (v.numpy() for v in vector.views), strict=True))
        last.close()
        assert same(center, weights(module))
    finally:
        for served in servers:
            served.kill()
            served.communicate()
