from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_easgd.communication import ExchangeError, Header, Phase, Stop, verify, verify_phases

HEADER = Header(
    clock=2**40,
    fingerprint=2**56 - 1,
    announced=7,
    phase=Phase.TRAINING,
    stop=Stop.TERMINATED,
    non_finite=False,
    checksum=2**63 - 1,
    wait_microseconds=5,
)


@given(
    st.dictionaries(
        st.text(), st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
    )
)
def test_a_header_survives_the_journey(named: dict[str, Any]):
    header = replace(HEADER, named=named)
    mine = replace(HEADER, clock=1, named={name: type(v)() for name, v in named.items()})
    there = mine.unpack(header.pack())
    assert there == header
    assert [type(v) for v in vars(there).values()] == [type(v) for v in vars(header).values()]
    assert [type(v) for v in there.named.values()] == [type(v) for v in named.values()]
    assert header.nbytes == 8 * len(header.pack())


def test_what_may_differ_between_workers():
    verify([HEADER, replace(HEADER, stop=Stop.NO, non_finite=True, wait_microseconds=9)])


def test_idle_workers_may_be_at_other_steps_and_places():
    verify([HEADER, replace(HEADER, phase=Phase.EPOCH_END, clock=3, checksum=0)])
    verify([HEADER, *(replace(HEADER, phase=phase, clock=3) for phase in list(Phase)[1:])])
    verify([replace(HEADER, phase=phase, clock=3) for phase in (Phase.EPOCH_END, Phase.FIT_END)])


@pytest.mark.parametrize("phase", [Phase.VALIDATION, Phase.COLLECTIVE, Phase.SAVE])
@pytest.mark.parametrize("other", [Phase.EPOCH_END, Phase.FIT_END])
def test_who_waits_for_another_that_stands_elsewhere_is_told(phase: Phase, other: Phase):
    verify_phases([replace(HEADER, phase=p) for p in (phase, phase)])
    with pytest.raises(ExchangeError, match=f"worker 0: {phase.name.lower()}; worker 1: .* end"):
        verify_phases([replace(HEADER, phase=p) for p in (phase, other)])


def test_who_ended_an_epoch_goes_on_without_who_ended_its_training():
    verify_phases([replace(HEADER, phase=p) for p in (Phase.EPOCH_END, Phase.FIT_END)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clock": 3}, r"worker 0 at step 1099511627776, worker 1 at step 3\)"),
        ({"fingerprint": 1}, "different sets of trainable parameters .*worker 1: parameter set 0"),
        ({"announced": 1}, "Some workers unfroze parameters that others did not"),
        ({"checksum": 1}, "center have drifted apart .*worker 1: center checksum 1"),
    ],
)
def test_workers_that_differ_are_named(change, message):
    with pytest.raises(ExchangeError, match=message):
        verify([HEADER, replace(HEADER, **change)])
