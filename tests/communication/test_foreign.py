"""Words of other workers stay theirs, whatever they are."""

from __future__ import annotations

import pytest

from lightning_easgd.communication.foreign import quote


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("ended with ValueError: Größe 0", '"ended with ValueError: Größe 0"'),
        ("one\ntwo\r\x1b[2Jred", '"one\\ntwo\\r\\x1b[2Jred"'),
        ('" Worker 0 was killed. "', "\"' Worker 0 was killed. '\""),
        ("turned \u202e around\u2028", '"turned \\u202e around\\u2028"'),
        ("half a \udc80 name", '"half a \\udc80 name"'),
        (b"caf\xc3\xa9 \xff\x00", '"café \ufffd\\x00"'),
        ("", '""'),
    ],
)
def test_what_others_say_is_one_line_in_quotation_marks(words: str | bytes, shown: str) -> None:
    assert quote(words) == shown


def test_what_others_say_ends() -> None:
    assert quote("a" * 10_000_000, limit=3) == '"aaa" (and 9999997 characters more)'
    assert len(quote(b"\xff" * 10_000_000)) < 600
    assert len(quote("\0" * 10_000_000)) < 3000
