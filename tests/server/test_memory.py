"""A server's process keeps the memory of frames: else each frame takes new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lightning_easgd.server import memory

FAULTS = """
import resource, runpy, sys
if sys.argv[1] == "kept":
    runpy.run_path(sys.argv[2])["keep_memory"]()
frame = bytes(2**21)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        answer = [bytearray(frame) for _ in range(3)]
        del answer
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.timeout(60)
def test_frames_take_no_new_pages() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc: run pytest on a Linux that has it, such as Debian")

    def faults(way: str) -> int:
        command = [sys.executable, "-c", FAULTS, way, memory.__file__]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=50).stdout)

    assert faults("kept") < 100 < faults("as it is")
