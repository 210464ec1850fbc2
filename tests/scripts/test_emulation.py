"""Emulated hosts, and training between them while a cable is pulled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from emulation import EmulatedHosts, EmulationError
from processes import Workers, on_host, run_workers
from toy import Toy, bits, loader, trainer, weights
from waiting import until

from lightning_easgd import EASGDStrategy, Groups

SGD = partial(torch.optim.SGD, lr=0.1)
REASON = emulation.unavailable()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def runs(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulationError, match="ip, tc, unshare not found: apt-get install iproute2"):
        EmulatedHosts(2).__enter__()
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(emulation.shutil, "which", lambda name: name)
    with pytest.raises(EmulationError, match=r"only root .* sudo"):
        EmulatedHosts(2).__enter__()


RECEIVE = """
import socket
with socket.create_server(("", 7000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    with connection:
        while connection.recv(65536):
            pass
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as connection:
    connection.sendall(bytes(1_000_000))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
"""


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_a_megabyte_at_8_megabits_takes_a_second_and_is_counted() -> None:
    with EmulatedHosts(2, rate_bits=8e6) as hosts:
        receiver = hosts.start(1, [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
        with receiver.stdout:
            assert receiver.stdout.readline() == b"ready\n"
        began = time.monotonic()
        sender = hosts.start(0, [sys.executable, "-c", SEND, hosts.address(1)])
        assert sender.wait(60) == receiver.wait(60) == 0
        assert time.monotonic() - began > 0.8
        assert 1_000_000 < hosts.traffic(0).sent < 1_200_000
        assert 1_000_000 < hosts.traffic(1).received < 1_200_000
        assert hosts.traffic(1).sent < 200_000


CONNECT = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 7000)):
    print(time.monotonic() - began)
"""


def netem() -> bool:
    command = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_a_delay_lengthens_the_way_there_and_back_or_says_what_the_kernel_lacks() -> None:
    if not netem():
        with pytest.raises(EmulationError, match="modprobe sch_netem"):
            EmulatedHosts(2, delay=0.05).__enter__()
        return
    with EmulatedHosts(2, rate_bits=1e8, delay=0.05) as hosts:
        receiver = hosts.start(1, [sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
        with receiver.stdout:
            assert receiver.stdout.readline() == b"ready\n"
        command = [sys.executable, "-c", CONNECT, hosts.address(1)]
        sender = hosts.start(0, command, stdout=subprocess.PIPE)
        assert float(sender.communicate(timeout=60)[0]) > 0.1


NESTED = """
import subprocess
with subprocess.Popen(["sleep", "600"]) as process:
    print(process.pid, flush=True)
"""


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_everything_goes_after_an_exception() -> None:
    processes = []

    def fail() -> None:
        with EmulatedHosts(2) as hosts:
            processes.append(hosts.start(0, [sys.executable, "-c", NESTED], stdout=subprocess.PIPE))
            with processes[0].stdout as output:
                processes.append(int(output.readline()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert processes[0].returncode == -signal.SIGKILL
    assert not runs(processes[1])


WAIT = """
import time
from emulation import EmulatedHosts
with EmulatedHosts(2) as hosts:
    sleeper = hosts.start(1, ["sleep", "600"])
    print(sleeper.pid, flush=True)
    time.sleep(600)
"""


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everything_goes_after_a_signal(number: signal.Signals) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        with script.stdout:
            sleeper = int(script.stdout.readline())
        deadline = time.monotonic() + 30
        while script.poll() is None and time.monotonic() < deadline:
            script.send_signal(number)  # impatiently; the first one counts
            time.sleep(0.01)
        script.wait(0)
        assert not runs(sleeper)
    finally:
        script.kill()
        script.wait()


@needs_hosts
@pytest.mark.usefixtures("nothing_left")
def test_what_a_killed_process_left_goes_when_the_next_makes_hosts() -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE) as script:
        assert script.stdout is not None
        sleeper = int(script.stdout.readline())
        until(lambda: Path(f"/proc/{sleeper}/comm").read_text() == "sleep\n")
        script.kill()
    left = [path for path in Path("/run/netns").iterdir() if f"-{script.pid}-" in path.name]
    assert len(left) == 3
    assert runs(sleeper)
    with EmulatedHosts(1):
        assert not any(path.exists() for path in left)
    until(lambda: not runs(sleeper))


@contextmanager
def training(hosts: EmulatedHosts, folder: Path, exchange_timeout: float) -> Iterator[Workers]:
    """Workers on all hosts, when worker 0 has paused in the middle of training."""
    task = on_host, hosts, train, folder, exchange_timeout
    with Workers(*task, workers=hosts.count) as workers:
        deadline = time.monotonic() + 60
        while not (folder / "paused").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield workers


def train(rank: int, folder: Path, exchange_timeout: float, pause: bool = True) -> Any:
    """The center in the end; at step 9 worker 0 makes ``paused`` and waits for ``go``."""
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")
    module = Toy(SGD)

    def on_train_batch_start(batch: object, batch_idx: int) -> None:
        if pause and rank == 0 and batch_idx == 9:
            (folder / "paused").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

    module.on_train_batch_start = on_train_batch_start
    strategy = EASGDStrategy(tau=4, exchange_timeout=exchange_timeout)
    workers = int(os.environ["WORLD_SIZE"])
    trainer(1, strategy, num_nodes=workers).fit(module, loader(rank, 24))
    return bits(weights(module))


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("who", [0, 1])
def test_all_end_when_a_cable_is_pulled_and_name_who_is_missing(who: int, tmp_path: Path) -> None:
    with EmulatedHosts(3) as hosts, training(hosts, tmp_path, exchange_timeout=3) as workers:
        hosts.cut(who)
        (tmp_path / "go").touch()
        outcomes = workers.collect(60)
    assert [outcome.error for outcome in outcomes] == ["ExchangeError"] * 3
    errors = [outcome.message for outcome in outcomes]
    if who == 1:
        assert all("Worker 1 gave no sign of life" in errors[rank] for rank in (0, 2))
        assert "Worker 0 cannot be reached" in errors[1]
    else:
        assert all(f"Worker {rank} gave no sign of life" in errors[0] for rank in (1, 2))
        assert all("Worker 0 cannot be reached" in errors[rank] for rank in (1, 2))


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_a_cable_that_is_out_for_a_moment_changes_no_bit(tmp_path: Path) -> None:
    with EmulatedHosts(2) as hosts, training(hosts, tmp_path, exchange_timeout=60) as workers:
        hosts.cut(1)
        (tmp_path / "go").touch()
        time.sleep(1.5)
        assert not any(pipe.poll() for pipe in workers.pipes)  # they wait for each other
        hosts.mend(1)
        outcomes = workers.collect(100)
    undisturbed = run_workers(train, tmp_path, 60, False, workers=2)
    assert [outcome.value for outcome in outcomes] == undisturbed


GROUPS = {"none": None, "averaged": "node", "tied": Groups("node", tau=2)}
PAUSES = (10, 30)
SIZE = 200_000


class Large(Toy):
    """With so many parameters that headers do not count."""

    def __init__(self) -> None:
        super().__init__(SGD)
        self.more = torch.nn.Parameter(torch.ones(SIZE))

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.more.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def train_in_groups(
    rank: int, hosts: EmulatedHosts, folder: Path, workers: int, groups: str
) -> None:
    """Between two exchanges, worker r makes ``<step>-<r>`` and waits for ``go-<step>``."""
    host, place = divmod(rank, workers)
    hosts.enter(host)
    world = hosts.count * workers
    os.environ.update(LOCAL_RANK=str(place), RANK=str(rank), WORLD_SIZE=str(world))
    module, strategy = Large(), EASGDStrategy(tau=4, groups=GROUPS[groups])

    def on_train_batch_start(batch: object, batch_idx: int) -> None:
        if batch_idx in PAUSES:
            strategy.center_state_dict()  # the sum has arrived
            (folder / f"{batch_idx}-{rank}").touch()
            while not (folder / f"go-{batch_idx}").exists():
                time.sleep(0.01)

    module.on_train_batch_start = on_train_batch_start
    trainer(workers, strategy, num_nodes=hosts.count).fit(module, loader(rank, 32))


def sent_per_exchange(folder: Path, workers: int, groups: str) -> float:
    """Bytes that one of two hosts with so many workers each sends in an exchange."""
    folder.mkdir()
    traffic = []
    with EmulatedHosts(2, rate_bits=100e6) as hosts:
        task = train_in_groups, hosts, folder, workers, groups
        with Workers(*task, workers=hosts.count * workers) as running:
            for pause in PAUSES:
                deadline = time.monotonic() + 60
                while len(list(folder.glob(f"{pause}-*"))) < hosts.count * workers:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                traffic.append(hosts.traffic(0).sent)
                (folder / f"go-{pause}").touch()
            assert not any(outcome.error for outcome in running.collect(60))
    return (traffic[1] - traffic[0]) / ((PAUSES[1] - PAUSES[0]) // 4)


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_what_leaves_a_host_does_not_grow_with_its_workers_if_they_are_a_group(
    tmp_path: Path,
) -> None:
    alone = sent_per_exchange(tmp_path / "none", 1, "none")
    assert alone > 4 * SIZE
    for groups in ("averaged", "tied"):
        assert sent_per_exchange(tmp_path / groups, 3, groups) < 1.05 * alone, groups
