"""What docs/extending.md shows trains as it says; all that CONTRIBUTING.md names is there."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from against_reference import reference_optimizers
from pages import ROOT, example
from processes import run_workers
from toy import Toy, batches, bits, initial_weights, loader, trainer, weights

from lightning_easgd import EASGDStrategy

STEPS = 14


def trained(rank: int, options: dict[str, Any]) -> Any:
    module, strategy = Toy(partial(torch.optim.SGD, lr=0.1)), EASGDStrategy(**options)
    trainer(2, strategy).fit(module, loader(rank, STEPS))
    return weights(module), strategy.telemetry


def test_the_rule_is_its_formula() -> None:
    rule = {"algorithm": example("HeavyBall")(0.5), "tau": 4}
    center = reference.restarting(
        reference.Bmuf(1.0, 0.5),
        initial_weights(),
        [batches(rank, STEPS) for rank in range(2)],
        reference_optimizers("sgd", lambda name, t: 0.1, 2),
        tau=4,
    )
    for found, _ in run_workers(trained, rule, workers=2):
        for key, value in found.items():
            np.testing.assert_allclose(value, center[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 300])
def test_the_codec_keeps_signs_and_their_mean_size(numel: int) -> None:
    codec, values = example("Signs")(), torch.randn(numel, dtype=torch.float64)
    wire = codec.encode(values)
    assert wire.shape == (codec.wire_bytes(numel),)
    decoded = codec.decode(wire, numel, torch.float64)
    torch.testing.assert_close(decoded, values.sign() * values.abs().mean(), rtol=1e-6, atol=0)


def test_the_codec_leaves_one_center_on_a_thirtieth_of_the_bytes() -> None:
    signs = {"compression": example("Signs")(), "tau": 2}
    runs = run_workers(trained, signs, workers=2)
    assert bits(runs[0][0]) == bits(runs[1][0])
    exact = run_workers(trained, {"tau": 2}, workers=2)
    assert runs[0][1].bytes_sent < exact[0][1].bytes_sent


def test_the_schedule_is_followed() -> None:
    sawtooth = example("Sawtooth")(0.125, 0.5, 6)
    assert [sawtooth.at(step) for step in (0, 2, 4, 5, 6)] == [0.125, 0.25, 0.375, 0.4375, 0.125]
    found = [
        bits(run_workers(trained, {"tau": 2, "alpha": alpha}, workers=2)[0][0])
        for alpha in (sawtooth, sawtooth.at, 0.125)
    ]
    assert found[0] == found[1] != found[2]


def test_all_that_it_names_is_there() -> None:
    text = "".join((ROOT / page).read_text() for page in ("CONTRIBUTING.md", "docs/extending.md"))
    named = re.findall(r"`([\w.]+(?:/[\w.]*)+)", text)
    assert len(named) > 12
    for path in named:
        assert (ROOT / path).exists(), path
