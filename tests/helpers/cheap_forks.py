"""What this process does once, so that none of the thousands of workers forked from it need to."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import toy
import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from lightning_easgd.communication import workers

MAPS = Path("/proc/self/maps")
"""What memory this process has; Linux only."""
WORTH_IT = 15
"""Tests that fork, and save together the second that ``keep_memory_shared`` takes."""
HUGE = 2**21
MADV_COLLAPSE = 25


def remember_packages() -> None:
    """Read once what is installed: every Trainer and every process group asks all packages."""
    installed: Any = metadata.entry_points()
    metadata.entry_points = lambda **asked: installed.select(**asked)


def remember_that_there_is_no_gpu() -> None:
    """Every step of an optimizer asks, and where there is no driver, looks for its library."""
    if not torch.cuda.device_count():
        torch.cuda._cached_device_count = 0


def remember_configurations() -> None:
    """Parse each text once: hundreds of tests compose the same files of ``conf/``."""
    load, loader = OmegaConf.load, get_yaml_loader()
    parse = cache(lambda text: yaml.load(text, Loader=loader))

    def remembered(file_: Any) -> Any:
        if not hasattr(file_, "read"):
            return load(file_)
        with suppress(yaml.YAMLError):  # which names the file, if it is read as usual
            parsed = parse(file_.read())
            if isinstance(parsed, dict):
                return OmegaConf.create(parsed)  # which copies it
        file_.seek(0)
        return load(file_)

    OmegaConf.load = remembered


def wait_with_fewer_looks() -> None:
    """Look a thousand times a second whether others have come, instead of ten thousand times.

    Where there are more workers than cores, these looks take a fifteenth of a test.
    """
    workers._POLL_SECONDS = 1e-3


def train_once() -> None:
    """What a first training makes once, and forks need not: imports, and what Lightning remembers.

    It takes 0.03 s here, and in each of the forks.
    """
    importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks")
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = toy.loader(0, 2)
        module = toy.Toy(partial(torch.optim.SGD, lr=0.1))
        toy.trainer(1, "auto").fit(module, data)
    logger.setLevel(level)


def keep_memory_shared(forking: int) -> None:
    """Let forks copy neither what was imported nor the table of its pages.

    These are 500 000 objects on 120 000 pages. To look for garbage among them, or to list these
    pages, takes a worker longer than most trainings.

    Args:
        forking: how many tests fork workers.
    """
    if forking >= WORTH_IT:
        train_once()
    gc.collect()
    gc.freeze()
    if forking < WORTH_IT or not MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for start, end in _own_memory():
        # Refused before Linux 6.1, and where no huge page is free; then the memory is as it was.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def _own_memory() -> Iterator[tuple[int, int]]:
    """Where Python's objects lie, in whole huge pages."""
    for line in MAPS.read_text().splitlines():
        place, rights, *_, name = f"{line} -".split()[:6]
        first, last = (int(number, 16) for number in place.split("-"))
        start, end = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if rights.startswith("rw") and name in ("-", "[heap]") and start < end:
            yield start, end
