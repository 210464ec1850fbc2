import gzip
import struct

import pytest
import torch

from lightning_easgd.workloads.idx import find_idx, read_idx

PIXELS = bytes(range(24))
WHOLE = struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 3, 4) + PIXELS


@pytest.mark.parametrize("name", ["images-idx3-ubyte", "images-idx3-ubyte.gz"])
def test_reads_plain_and_gzipped_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(WHOLE) if name.endswith(".gz") else WHOLE)
    assert find_idx(tmp_path, "images-idx3-ubyte") == path
    assert torch.equal(read_idx(path), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


def test_no_file_is_found_in_an_empty_or_missing_folder(tmp_path):
    assert find_idx(tmp_path, "images") is None
    assert find_idx(tmp_path / "missing", "images") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:-1], "23 bytes of data; allowed is 24"),
        (WHOLE + b"\0", "25 bytes of data; allowed is 24"),
        (WHOLE[:9], "header of 9 bytes; allowed is 16"),
        (b"", "first bytes b''"),
        (b"\0\0\x0d" + WHOLE[3:], "allowed is those of IDX"),
        (b"PNG!" + WHOLE, "first bytes b'PNG!'"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda zipped: zipped[:-12], lambda zipped: b"no gzip at all"])
def test_damaged_compression_is_named(tmp_path, damage):
    path = tmp_path / "damaged.gz"
    path.write_bytes(damage(gzip.compress(WHOLE)))
    with pytest.raises(ValueError, match=r"damaged\.gz has broken compression"):
        read_idx(path)
