"""What this process does once, so that none of the thousands of workers forked from it need to."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

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


def keep_memory_shared(forking: int) -> None:
    """Let forks copy neither what was imported nor the table of its pages.

    These are 500 000 objects on 120 000 pages. To look for garbage among them, or to list these
    pages, takes a worker longer than most trainings.

    Args:
        forking: how many tests fork workers.
    """
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
