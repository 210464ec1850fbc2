"""Real workers for tests: one forked process each, a hard time limit, results or errors back."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import forking
import stacks
from emulation import EmulatedHosts
from forking import free_port as free

__all__ = [
    "Forked",
    "Workers",
    "become_slurm_task",
    "free_port",
    "on_host",
    "processes_of",
    "run_script",
    "run_workers",
]


class Workers(forking.Workers):
    """Those of scripts/forking.py. Who waits for them too long sees where they are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        stacks.be_ready()
        super().__init__(*args, **options)

    def collect(self, timeout: float, without: int | None = None) -> list[forking.Outcome]:
        try:
            return super().collect(timeout, without)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{stacks.of_forks()}") from None


def run_workers(
    target: Callable[..., Any], *args: Any, workers: int, timeout: float = 60, check: bool = True
) -> list[Any]:
    """Run ``target(rank, *args)`` in ``workers`` processes that can join one process group.

    Returns what each returned, in rank order; with ``check=False`` an ``Outcome`` each. A
    worker that is not back within ``timeout`` seconds is killed with all others, and the test
    fails.
    """
    with Workers(target, *args, workers=workers) as group:
        outcomes = group.collect(timeout)
    if not check:
        return outcomes
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"worker {rank}: {outcome.trace}"
    return [outcome.value for outcome in outcomes]


def on_host(rank: int, hosts: EmulatedHosts, target: Callable[..., Any], *args: Any) -> Any:
    """Run ``target(rank, *args)`` as the worker of the emulated host with this number."""
    hosts.enter(rank)
    return target(rank, *args)


def run_script(
    script: Path,
    arguments: Sequence[str],
    *,
    folder: Path,
    workers: int | None,
    code: int = 0,
    hosts: EmulatedHosts | None = None,
) -> str:
    """Run a script in ``folder`` as each of its workers under torchrun; what they printed.

    With ``workers=None`` it runs as typed by a user, and starts its workers by itself. All are
    forked, and so need not import torch and Lightning, which takes most of a short job.
    With ``hosts``, each runs on one of them.
    """
    _import_what_scripts_do()
    target = (_be_script,) if hosts is None else (on_host, hosts, _be_script)
    options = {"workers": workers or 1, "timeout": 150}
    ended = run_workers(*target, script, arguments, folder, workers is None, **options)
    printed = "\n".join(text for _, text in ended)
    assert [found for found, _ in ended] == [code] * len(ended), printed
    return printed


@cache
def _import_what_scripts_do() -> None:
    """The digits, and what draws: here once, and then not in each of their processes."""
    for name in ("sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        with suppress(ImportError):
            import_module(name)


def _be_script(
    rank: int, script: Path, arguments: Sequence[str], folder: Path, typed: bool
) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    if typed:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    os.chdir(folder)
    path = folder / f"printed by {rank}"
    with path.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        sys.stdout = sys.stderr = printed
        code = _run_as_main([str(script), *arguments])
    text = path.read_text()
    path.unlink()
    return code, text


def _run_as_main(arguments: Sequence[str]) -> int:
    """What this interpreter does with these arguments, and its exit code."""
    warnings.resetwarnings()  # not errors, as in tests
    first, *others = arguments
    try:
        if first == "-c":
            code, *others = others
            sys.argv = ["-c", *others]
            exec(code, {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*arguments]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Forked(subprocess.Popen[Any]):
    """As Popen, of a command of this interpreter, which is forked and so need not import torch.

    That takes 2 to 5 s. It is no interpreter of its own where one starts or shuts down.
    """

    def __init__(
        self, args: Sequence[object], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        command = [*map(str, args)]
        be_it = partial(_be_interpreter, [each for each in command[1:] if each != "-u"], env)
        super().__init__(command, preexec_fn=be_it, **options)


def _be_interpreter(arguments: Sequence[str], variables: Mapping[str, str] | None) -> None:
    gc.enable()  # subprocess forks without
    # Exec would close all files, for which subprocess waits. What was inherited may yet close them
    # again, so no other file gets their numbers. Those by which gRPC wakes its threads stay: if an
    # earlier test used gRPC, it still reads them in this process, and without them never stops.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            wakes = os.readlink(f"/proc/self/fd/{file}").startswith("anon_inode:")
            if file > 2 and not wakes:
                os.dup2(nowhere, file)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if variables is not None:
        os.environ.clear()
        os.environ.update(variables)
    sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))
    code = _run_as_main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def until_written(path: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command, run in the folder of a file, when it has written that; it is killed behind it."""
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=path.parent, stdout=nowhere, stderr=nowhere) as process:
        try:
            _await(path, lambda: process.poll() is None)
            yield process
        finally:
            process.kill()


@contextmanager
def forked_until_written(
    path: Path, script: Path, arguments: Sequence[str], folder: Path | None = None
) -> Iterator[Workers]:
    """As :func:`until_written`, but forked, as :func:`run_script` does, in this folder if given."""
    task = _be_script, script, arguments, folder or path.parent, True
    with Workers(*task, workers=1) as script_alone:
        _await(path, script_alone.processes[0].is_alive)
        yield script_alone


def end_by(number: signal.Signals, script_alone: Workers) -> tuple[int, str]:
    """The exit code of a script that is sent a signal, and what it printed."""
    os.kill(script_alone.processes[0].pid, number)
    (outcome,) = script_alone.collect(60)
    assert outcome.error is None, outcome.trace
    return outcome.value


def _await(path: Path, lives: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert lives()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port() -> int:
    return int(free())


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines of running processes that name ``folder``, or of others that run in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode().replace("\0", " ")
            place = os.readlink(path.parent / "cwd")
        except OSError:
            continue
        if str(folder) in line or place == str(folder):
            found[int(path.parent.name)] = line
    return found


def become_slurm_task(rank: int, port: int) -> None:
    """Replace this worker's variables by those that srun sets for 2 tasks on one node."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR"):
        del os.environ[name]
    os.environ.update(
        SLURM_JOB_ID="7",
        SLURM_JOB_NAME="train",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_NODELIST="127.0.0.1",
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        MASTER_PORT=str(port),
    )
