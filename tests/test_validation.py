"""What the constructor refuses: one table, each row of which is an error with a way out."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_easgd import AdaptivePeriod, Auto, EASGDStrategy, Groups
from lightning_easgd.strategy.validation import REFUSED

RESTARTS: dict[str, Any] = {"algorithm": "local_sgd"}
CENTERS: dict[str, Any] = {"groups": Groups(2)}

EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("beta", "algorithm"): {"beta": 0.9, **RESTARTS},
    ("alpha", "algorithm"): {"alpha": 0.0, **RESTARTS},
    ("rho", "algorithm"): {"rho": 1.0, **RESTARTS},
    ("elastic_point", "algorithm"): {"elastic_point": "iterate", **RESTARTS},
    ("tau", "algorithm"): {"tau": Auto(), **RESTARTS},
    ("groups", "algorithm"): {"groups": 2, "algorithm": "post_local_sgd"},
    ("algorithm", "groups"): {"algorithm": "sma", **CENTERS},
    ("rho", "groups"): {"rho": 1, **CENTERS},
    ("compression", "groups"): {"compression": "int8", **CENTERS},
    ("center_device", "groups"): {"center_device": "cpu", **CENTERS},
    ("center_average", "groups"): {"center_average": "ema", **CENTERS},
    ("fragments", "groups"): {"fragments": 2, **CENTERS},
    ("tau", "groups"): {"tau": "auto", **CENTERS},
    ("beta", "groups"): {"beta": lambda step: 0.9, **CENTERS},
    ("alpha", "groups"): {"alpha": lambda step: 0.1, **CENTERS},
    ("overlap", "algorithm"): {"overlap": True, **RESTARTS},
    ("tau", "overlap"): {"tau": "auto", "overlap": False},
    ("tau", "compression"): {"tau": AdaptivePeriod(), "compression": "topk"},
}


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: f"{entry.option}-{entry.beside}")
def test_every_combination_of_the_table_is_refused_with_a_way_out(entry: Any) -> None:
    with pytest.raises(ValueError, match=f"^{entry.option}=.* is not possible with ") as raised:
        EASGDStrategy(**EXAMPLES[entry.option, entry.beside])
    assert entry.because in str(raised.value)
    assert entry.instead.split("{")[0] in str(raised.value)


def test_every_example_is_of_a_row_of_its_own() -> None:
    assert sorted(EXAMPLES) == sorted((entry.option, entry.beside) for entry in REFUSED)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"tau": "often", **CENTERS}, "tau='often' is not a communication period"),
        ({"overlap": "yes", **RESTARTS}, "overlap='yes' is not allowed"),
        ({"beta": 3, **RESTARTS}, "beta=3 is not allowed"),
        ({"rho": 1.0, "bucket_bytes": 0, **CENTERS}, "bucket_bytes=0 is not allowed"),
        ({"compression": "int7", **CENTERS}, "compression='int7' is not a codec"),
    ],
)
def test_a_value_that_is_wrong_by_itself_is_named_first(
    options: dict[str, Any], first: str
) -> None:
    with pytest.raises(ValueError, match=first):
        EASGDStrategy(**options)
