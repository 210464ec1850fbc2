"""Reading IDX files, the format of MNIST and of the sets made in its image."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """The file `name` or `name`.gz in the folder, the plain one first; None if there is neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_idx(path: Path) -> Tensor:
    """The tensor that an IDX file of unsigned bytes holds.

    Args:
        path: The file, decompressed on the way if its name ends in .gz.

    Returns:
        A uint8 tensor of the shape that the file's header states.

    Raises:
        ValueError: If the file is damaged, truncated, or not an IDX file of unsigned bytes.
    """
    content = _read(path)
    shape = _shape(path, content)
    header_bytes = 4 + 4 * len(shape)
    found, wanted = len(content) - header_bytes, math.prod(shape)
    if found != wanted:
        raise _damaged(path, f"{found} bytes of data", f"{wanted}, as its header says")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header_bytes).view(shape)


def _read(path: Path) -> bytearray:
    if path.suffix != ".gz":
        return bytearray(path.read_bytes())
    try:
        with gzip.open(path) as file:
            return bytearray(file.read())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"broken compression ({error})", "a whole gzip file") from error


def _shape(path: Path, content: bytearray) -> tuple[int, ...]:
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or not content[3]:
        raise _damaged(path, f"the first bytes {bytes(content[:4])!r}", "those of IDX, 0 0 8 ndim")
    header = content[4 : 4 + 4 * content[3]]
    if len(header) != 4 * content[3]:
        raise _damaged(path, f"a header of {4 + len(header)} bytes", f"{4 + 4 * content[3]}")
    return struct.unpack(f">{content[3]}I", header)


def _damaged(path: Path, got: str, allowed: str) -> ValueError:
    return ValueError(f"{path} has {got}; allowed is {allowed}. Delete it and get it again.")
