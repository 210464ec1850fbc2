"""What the constructor refuses: one table, each row of which is an error with a way out."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_easgd import EASGD, AdaptivePeriod, Auto, EASGDStrategy, Groups, Linear, Often, TopK
from lightning_easgd.strategy.validation import REFUSED, Combination

RESTARTS: dict[str, Any] = {"algorithm": "local_sgd"}
CENTERS: dict[str, Any] = {"groups": Groups(2)}

SERVER: dict[str, Any] = {"center": "127.0.0.1:5700"}
PULL: dict[str, Any] = {"algorithm": EASGD(pull=0.4)}

EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("beta", "algorithm"): {"beta": 0.9, **RESTARTS},
    ("alpha", "algorithm"): {"alpha": 0.0, **RESTARTS},
    ("rho", "algorithm"): {"rho": 1.0, **RESTARTS},
    ("elastic_point", "algorithm"): {"elastic_point": "iterate", **RESTARTS},
    ("alpha", "algorithm with pull"): {"alpha": 0.1, **PULL},
    ("rho", "algorithm with pull"): {"rho": 1.0, **PULL},
    ("compression", "algorithm with pull"): {"compression": TopK(0.1), **PULL},
    ("tau", "algorithm"): {"tau": Auto(), **RESTARTS},
    ("often", "algorithm"): {"often": Often(), **RESTARTS},
    ("often", "groups"): {"often": Often(), "groups": 2},
    ("often", "center_average"): {"often": Often(), "center_average": "ema"},
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
    ("algorithm", "center"): {"algorithm": "diloco", **SERVER},
    ("tau", "center"): {"tau": "auto", **SERVER},
    ("tau", "center, none"): {"tau": "even"},
    ("beta", "center, an address"): {"beta": 0.9, **SERVER},
    ("beta", "center"): {"beta": Linear(0.5, 0.9, steps=9), "center": "local"},
    ("alpha", "center"): {"alpha": 0.1, **SERVER},
    ("rho", "center"): {"rho": 1.0, **SERVER},
    ("groups", "center"): {"groups": 2, **SERVER},
    ("often", "center"): {"often": Often(), **SERVER},
    ("fragments", "center"): {"fragments": 2, **SERVER},
    ("compression", "center"): {"compression": "topk", **SERVER},
    ("center_device", "center"): {"center_device": "cpu", **SERVER},
    ("buffers", "center"): {"buffers": {"*": "broadcast"}, **SERVER},
}


def key(entry: Combination) -> tuple[str, str]:
    more = {"EASGD(pull=...)": " with pull", "an address": ", an address", "none": ", none"}
    return entry.option, entry.beside + more.get(entry.where, "")


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: "-".join(key(entry)))
def test_every_combination_of_the_table_is_refused_with_a_way_out(entry: Any) -> None:
    with pytest.raises(ValueError, match=f"^{entry.option}=.* is not possible with ") as raised:
        EASGDStrategy(**EXAMPLES[key(entry)])
    assert entry.because in str(raised.value)
    assert entry.instead.split("{")[0] in str(raised.value)


def test_every_example_is_of_a_row_of_its_own() -> None:
    assert list(EXAMPLES) == [key(entry) for entry in REFUSED]


@pytest.mark.parametrize("options", [{"algorithm": EASGD(pull=0.4), **CENTERS}])
def test_a_row_may_have_more_than_one_example(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="centers of groups are tied elastically"):
        EASGDStrategy(**options)


BETA = r"beta=1.2 diverges with EASGD\(.*pull=0.5.*\), which is stable for beta below 1\. "


@pytest.mark.parametrize("beta", [1.2, Linear(0.5, 1.2, steps=9), lambda step: 1.2])
def test_a_beta_that_is_not_stable_with_the_pull_is_refused(beta: Any) -> None:
    with pytest.raises(ValueError, match=BETA):
        EASGDStrategy(algorithm=EASGD(pull=0.5, look_ahead=1), beta=beta)


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
