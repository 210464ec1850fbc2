"""What this process does once, so that none of the thousands of workers forked from it need to."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import toy
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository

from lightning_easgd.communication import workers

MAPS = Path("/proc/self/maps")
"""What memory this process has; Linux only."""
CONFIGURATIONS = {
    f"file://{Path(__file__).parents[2] / 'conf'}",
    *("pkg://hydra.conf", "structured://"),
}
"""Where configurations are that no test changes."""
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
    """Read each file of ``conf/`` once: hundreds of tests compose the same, from copies of them.

    Half of the time to compose goes otherwise to parsing, and to choices that nobody asks for.
    """
    load, choices = ConfigRepository.load_config, defaults_list._create_interpolation_map
    known: dict[Any, Any] = {}

    def load_once(self: ConfigRepository, config_path: str) -> Any:
        place = config_path, *((each.provider, each.path) for each in self.sources)
        if place in known:
            return copy.deepcopy(known[place])
        found = load(self, config_path)
        if found is not None and found.path in CONFIGURATIONS:
            known[place] = copy.deepcopy(found)
        return found

    def choices_if_asked_for(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        asked = any(not each.is_self() and each.is_interpolation() for each in defaults)
        return choices(overrides, defaults, self_added) if asked else None

    ConfigRepository.load_config = load_once
    ConfigRepository.__deepcopy__ = lambda self, _: copy.copy(self)  # its list is replaced whole
    defaults_list._create_interpolation_map = choices_if_asked_for


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
