"""What workers of several launchers do: one fit each at a server, of which all have one center."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from toy import Toy, initial_weights, loader, trainer, weights

SGD = partial(torch.optim.SGD, lr=0.1)


def fit_at_a_server(rank: int, **options: Any) -> dict[str, Any]:
    module = Toy(SGD)
    fitting = trainer(2, "easgd_async", max_epochs=3, **options)
    fitting.fit(module, loader(rank, 5 + rank))
    telemetry = fitting.strategy.telemetry
    return {
        "rank": fitting.global_rank,
        "w": weights(module)["w"].tolist(),
        "steps": fitting.global_step,
        "added": telemetry.differences_added,
        "alpha": telemetry.alpha,
    }


def require_one_center(found: list[dict[str, Any]]) -> None:
    assert [each["rank"] for each in found] == [0, 1]
    assert found[0]["w"] == found[1]["w"] != initial_weights()["w"].tolist()
    assert [each["steps"] for each in found] == [15, 18]
    assert [each["added"] for each in found] == [2, 2]  # at 10, and the last
    assert [each["alpha"] for each in found] == [0.45, 0.45]
