from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_easgd.communication import ExchangeError, Header, Place, Stop, verify, verify_places

HEADER = Header(
    clock=2**40,
    fingerprint=2**56 - 1,
    announced=7,
    place=Place.TRAINING,
    stop=Stop.TERMINATED,
    non_finite=False,
    checksum=2**63 - 1,
    wait_microseconds=5,
)


def test_a_header_survives_the_journey():
    assert Header.unpack(HEADER.pack()) == HEADER


def test_what_may_differ_between_workers():
    verify([HEADER, replace(HEADER, stop=Stop.NO, non_finite=True, wait_microseconds=9)])


def test_workers_that_stand_still_may_be_at_other_steps_and_places():
    verify([HEADER, replace(HEADER, place=Place.EPOCH_END, clock=3, checksum=0)])
    verify([HEADER, *(replace(HEADER, place=place, clock=3) for place in list(Place)[1:])])
    verify([replace(HEADER, place=place, clock=3) for place in (Place.EPOCH_END, Place.FIT_END)])


@pytest.mark.parametrize("place", [Place.VALIDATION, Place.COLLECTIVE, Place.SAVE])
@pytest.mark.parametrize("other", [Place.EPOCH_END, Place.FIT_END])
def test_who_waits_for_another_that_stands_elsewhere_is_told(place: Place, other: Place):
    verify_places([replace(HEADER, place=p) for p in (place, place)])
    with pytest.raises(ExchangeError, match=f"worker 0: {place.name.lower()}; worker 1: .* end"):
        verify_places([replace(HEADER, place=p) for p in (place, other)])


def test_who_ended_an_epoch_goes_on_without_who_ended_its_training():
    verify_places([replace(HEADER, place=p) for p in (Place.EPOCH_END, Place.FIT_END)])


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
