"""Emulated hosts, and training between them while a cable is pulled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import emulated
import emulated_groups
import emulation
import pytest
import torch
from emulation import EmulatedHosts, EmulationError
from processes import run_workers

HERE = Path(__file__).parents[1]
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
        env=os.environ | {"PYTHONPATH": str(HERE.parent / "scripts")},
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


def start_training(
    hosts: EmulatedHosts, folder: Path, exchange_timeout: float
) -> list[subprocess.Popen[str]]:
    """Workers on all hosts, when worker 0 has paused in the middle of training."""
    command = [sys.executable, str(HERE / "emulated.py"), str(folder), str(exchange_timeout)]
    env = {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    workers = []
    for host in range(hosts.count):
        with (folder / f"{host}.log").open("w") as log:
            workers.append(hosts.start(host, command, env=env, stdout=log, stderr=log, text=True))
    deadline = time.monotonic() + 100
    while not (folder / "paused").exists():
        assert time.monotonic() < deadline, (folder / "0.log").read_text()
        time.sleep(0.05)
    return workers


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("who", [0, 1])
def test_all_end_when_a_cable_is_pulled_and_name_who_is_missing(who: int, tmp_path: Path) -> None:
    with EmulatedHosts(3) as hosts:
        workers = start_training(hosts, tmp_path, exchange_timeout=3)
        hosts.cut(who)
        (tmp_path / "go").touch()
        assert all(worker.wait(60) for worker in workers)
    errors = [(tmp_path / f"{rank}.log").read_text() for rank in range(3)]
    assert all("ExchangeError: " in error for error in errors)
    if who == 1:
        assert all("Worker 1 gave no sign of life" in errors[rank] for rank in (0, 2))
        assert "Worker 0 cannot be reached" in errors[1]
    else:
        assert all(f"Worker {rank} gave no sign of life" in errors[0] for rank in (1, 2))
        assert all("Worker 0 cannot be reached" in errors[rank] for rank in (1, 2))
    assert not list(tmp_path.glob("*.pt"))


def undisturbed(rank: int, folder: Path) -> None:
    os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0")
    emulated.train(folder, 60, pause=False)


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_a_cable_that_is_out_for_a_moment_changes_no_bit(tmp_path: Path) -> None:
    with EmulatedHosts(2) as hosts:
        workers = start_training(hosts, tmp_path, exchange_timeout=60)
        hosts.cut(1)
        (tmp_path / "go").touch()
        time.sleep(1.5)
        assert [worker.poll() for worker in workers] == [None, None]  # they wait for each other
        hosts.mend(1)
        assert [worker.wait(100) for worker in workers] == [0, 0]
    (tmp_path / "undisturbed").mkdir()
    run_workers(undisturbed, tmp_path / "undisturbed", workers=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        expected = torch.load(tmp_path / "undisturbed" / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def sent_per_exchange(folder: Path, workers: int, groups: str) -> float:
    """Bytes that one of two hosts with so many workers each sends in an exchange."""
    folder.mkdir()
    script = str(HERE / "emulated_groups.py")
    command = [sys.executable, script, str(folder), str(workers), groups]
    env = {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    traffic = []
    with EmulatedHosts(emulated_groups.HOSTS, rate_bits=100e6) as hosts:
        for host in range(hosts.count):
            with (folder / f"{host}.log").open("w") as log:
                hosts.start(host, command, env=env, stdout=log, stderr=log)
        for pause in emulated_groups.PAUSES:
            deadline = time.monotonic() + 100
            while len(list(folder.glob(f"{pause}-*"))) < hosts.count * workers:
                assert time.monotonic() < deadline, (folder / "0.log").read_text()
                time.sleep(0.05)
            traffic.append(hosts.traffic(0).sent)
            (folder / f"go-{pause}").touch()
    first, second = emulated_groups.PAUSES
    return (traffic[1] - traffic[0]) / ((second - first) // emulated_groups.TAU)


@needs_hosts
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_what_leaves_a_host_does_not_grow_with_its_workers_if_they_are_a_group(
    tmp_path: Path,
) -> None:
    alone = sent_per_exchange(tmp_path / "none", 1, "none")
    assert alone > 4 * emulated_groups.SIZE
    for groups in ("averaged", "tied"):
        assert sent_per_exchange(tmp_path / groups, 3, groups) < 1.05 * alone, groups
