"""Workers that stay for all tests of a file.

A forked worker copies the memory that it touches, and its first training costs as much as the next
two: a training of 8 steps takes less than half as long in one that stays, longer ones gain less. So
a file whose workers leave their process as it was takes ``run_workers`` from here. Each job has
what a new process would have: the variables, folder, warning filters and random numbers of its
test, and no process group. A test that patches this process, or whose job cannot be pickled, has
workers of its own. So has the one after a failure.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import numpy as np
import processes
import stacks
import torch
from forking import FORK, Outcome, one_node

from lightning_easgd.communication.workers import leave_all_groups

patching = False
"""Whether the test that runs now may patch this process; set by running.py."""

_file = ""
_staying: dict[int, Staying] = {}
"""Of the tests of this file, by how many they are."""


def run_workers(
    target: Callable[..., Any], *args: Any, workers: int, timeout: float = 60, check: bool = True
) -> list[Any]:
    """As processes.run_workers; those that are to return stay for the next test of this file."""
    job = _job(target, args, workers) if check and not patching else None
    if job is None:
        options = {"workers": workers, "timeout": timeout, "check": check}
        return processes.run_workers(target, *args, **options)
    _begin_file(os.environ["PYTEST_CURRENT_TEST"].partition("::")[0])
    if workers not in _staying:
        _staying[workers] = Staying(workers)
    try:
        return _staying[workers].run(job, timeout)
    except BaseException:
        end()
        raise


def run_in_turn(
    target: Callable[..., Any], cases: Sequence[tuple[Any, ...]], *, workers: int
) -> list[list[Any]]:
    """Run ``target(rank, *case)`` for one case after another.

    Returns for each case what each worker returned.
    """
    ended = run_workers(_each, target, cases, workers=workers)
    return [list(of_case) for of_case in zip(*ended, strict=True)]


def _each(rank: int, target: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    # Copies, as of workers of its own: cases may share what changes in training.
    return [target(rank, *copy.deepcopy(case)) for case in cases]


def end() -> None:
    """End all that stay."""
    while _staying:
        _staying.popitem()[1].close()


def running() -> set[str]:
    """The processes of those that stay."""
    return {str(process.pid) for each in _staying.values() for process in each.group.processes}


def _begin_file(name: str) -> None:
    global _file
    if name != _file:
        end()
        _file = name


def _job(target: Any, args: Any, workers: int) -> bytes | None:
    variables = {**os.environ, **one_node(workers)}
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        return pickle.dumps((target, args, variables, os.getcwd(), warnings.filters, numbers))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None


class Staying:
    """So many workers, which do one job after another."""

    def __init__(self, workers: int) -> None:
        jobs, results = ([FORK.Pipe(duplex=False) for _ in range(workers)] for _ in range(2))
        self._jobs = [sender for _, sender in jobs]
        self._results = [receiver for receiver, _ in results]
        served = [receiver for receiver, _ in jobs], [sender for _, sender in results]
        self.group = processes.Workers(_serve, *served, workers=workers)
        for pipe in [*served[0], *served[1]]:
            pipe.close()

    def run(self, job: bytes, timeout: float) -> list[Any]:
        """What it returned in each."""
        for pipe in self._jobs:
            pipe.send_bytes(job)
        deadline = time.monotonic() + timeout
        left = dict(zip(self._results, range(len(self._results)), strict=True))
        found: dict[int, Any] = {}
        while left:
            ended = [self.group.processes[rank].sentinel for rank in left.values()]
            connection.wait([*left, *ended], max(0.0, deadline - time.monotonic()))
            ready = [pipe for pipe in left if pipe.poll()]
            late = f"workers {[*left.values()]} died, or were not back after {timeout:g} s"
            assert ready, f"{late}\n{stacks.of_forks()}"
            for pipe in ready:
                outcome = pipe.recv()
                assert outcome.error is None, f"worker {left[pipe]}: {outcome.trace}"
                found[left.pop(pipe)] = outcome.value
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        with self.group:
            for pipe in [*self._jobs, *self._results]:
                pipe.close()


def _serve(rank: int, jobs: Any, results: Any) -> None:
    while True:
        target, args, variables, folder, filters, numbers = pickle.loads(jobs[rank].recv_bytes())
        os.environ.clear()
        os.environ.update(variables, LOCAL_RANK=str(rank), RANK=str(rank))
        os.chdir(folder)
        warnings.resetwarnings()
        warnings.filters[:] = filters
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        try:
            outcome = Outcome(value=target(rank, *args))
        except BaseException as error:
            outcome = Outcome(error=type(error).__name__, trace=traceback.format_exc())
        else:
            leave_all_groups()
        results[rank].send(outcome)
