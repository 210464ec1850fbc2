from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_easgd.communication import ExchangeError, Header, verify

HEADER = Header(
    clock=2**40,
    fingerprint=2**56 - 1,
    announced=7,
    done=False,
    stop=True,
    non_finite=False,
    checksum=2**63 - 1,
    wait_microseconds=5,
)


def test_a_header_survives_the_journey():
    assert Header.unpack(HEADER.pack()) == HEADER


def test_what_may_differ_between_workers():
    verify([HEADER, replace(HEADER, stop=False, non_finite=True, wait_microseconds=9)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clock": 3}, r"worker 0: step 1099511627776; worker 1: step 3\)"),
        ({"done": True}, "worker 1: step 1099511627776, at the end of training"),
        ({"fingerprint": 1}, "different sets of trainable parameters .*worker 1: parameter set 0"),
        ({"announced": 1}, "Some workers unfroze parameters that others did not"),
        ({"checksum": 1}, "center have drifted apart .*worker 1: center checksum 1"),
    ],
)
def test_workers_that_differ_are_named(change, message):
    with pytest.raises(ExchangeError, match=message):
        verify([HEADER, replace(HEADER, **change)])
