"""Made-up results as scripts/compare.py stores them, of a comparison at 100 Mbit/s."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comparing.result import Point, Result, WorkerTime

HOSTS, EPOCHS, SAMPLES = 4, 5, 60_000
PARAMETERS_BYTES = 3_280_000
TITLES = {
    "ddp": "DDP",
    "ddp_bf16": "DDP, bf16 gradients",
    "easgd": "EASGD",
    "eamsgd": "EAMSGD",
    "downpour": "DOWNPOUR",
}
_STEP = 0.05
# Title: error in the end, seconds of a step at 100 Mbit/s, bytes as a share of DDP's, how it waits.
_KINDS = {
    "ddp": (0.108, 0.42, 1.0, None),
    "ddp_bf16": (0.109, 0.23, 0.5, None),
    "easgd": (0.116, 0.053, 1 / 16, 0.02),
    "eamsgd": (0.112, 0.054, 1 / 16, 0.02),
    "downpour": (0.118, 0.075, 1 / 16, 0.3),
}


def about(**other: Any) -> dict[str, Any]:
    """What about.json says of them."""
    return {
        "command": "python scripts/compare.py data=fashion_mnist network=100mbit seeds=3",
        "started": "2026-11-29T15:20:00+00:00",
        "commit": "0996cb7",
        "versions": {"python": "3.11.2", "torch": "2.9.0", "lightning": "2.6.4"},
        "machine": {"name": "box", "cpu": "A CPU", "cores": 2, "system": "Linux 6.1"},
        "network": "100mbit",
        "workers": HOSTS,
        "model": "CNN",
        "data": "fashion_mnist",
        "metric": "val/accuracy",
        "lower_is_better": False,
        "target": 0.88,
        "baseline": "ddp",
        "titles": dict(TITLES),
        "taus": [16],
        "seeds": [42, 43, 44],
        "rates": {name: [0.1, 0.2, 0.5] for name in TITLES},
        "tuning_seeds": 2,
        "epochs": EPOCHS,
        **other,
    }


def results(
    names: Sequence[str] = tuple(TITLES), seeds: Sequence[int] = (42, 43, 44), tests: int = 20
) -> list[Result]:
    """Those of the tuning at three rates without a network, and those that count."""
    tuning = [
        replace(_result(name, seed, rate, tests), network=None, link_rate=None, tuning=True)
        for name in names
        for seed in seeds[:2]
        for rate in (0.1, 0.2, 0.5)
    ]
    return tuning + [_result(name, seed, 0.2, tests) for seed in seeds for name in names]


def in_bits_per_byte(result: Result) -> Result:
    """The same of a language model."""
    points = tuple(replace(p, score=_bits(p.score)) for p in result.points)
    return replace(result, points=points, score=_bits(result.score))


def diverged(result: Result) -> Result:
    """The same, but it did not go well."""
    points = tuple(
        replace(p, score=0.1 if n else p.score, distance=(p.distance or 0.0) * 4.0**n)
        for n, p in enumerate(result.points[:8])
    )
    why = "the test loss was 5.2, that of guessing is 2.3"
    return replace(result, points=points, score=None, loss=None, diverged=why)


def failed(result: Result, why: str = "Traceback ...\nRuntimeError: no <luck> & no time") -> Result:
    """The same job, which ended with an error."""
    return Result.of(result.job, {}, 1.0, error=why)


def _result(name: str, seed: int, rate: float, tests: int) -> Result:
    draw = random.Random(f"{name} {seed} {rate}")
    error, step, share, waits = _KINDS[name]
    error += {0.1: 0.012, 0.2: 0.0, 0.5: 0.006}[rate] + draw.gauss(0, 0.0012)
    step *= draw.uniform(0.97, 1.03)
    steps = EPOCHS * SAMPLES // 64 // HOSTS
    ddp_bytes = 2 * (HOSTS - 1) / HOSTS * PARAMETERS_BYTES
    moments = [steps * number // tests for number in range(1, tests + 1)]
    points = tuple(
        Point(
            seconds=moment * step,
            step=moment,
            samples=moment * 64 * HOSTS,
            sent_bytes=moment * share * ddp_bytes,
            score=1 - error - 0.45 * math.exp(-moment / steps * 4.5) + draw.gauss(0, 0.001),
            distance=None if waits is None else 0.05 + 0.08 * math.exp(-3 * moment / steps),
        )
        for moment in moments
    )
    return Result(
        contender=name,
        tau=None if waits is None else 16,
        rate=rate,
        seed=seed,
        network="100mbit",
        hosts=HOSTS,
        job_seconds=steps * step + 20,
        score=points[-1].score,
        seconds=points[-1].seconds,
        steps=steps,
        samples=points[-1].samples,
        sent_bytes=points[-1].sent_bytes,
        ddp_bytes=steps * ddp_bytes,
        points=points,
        workers=tuple(_worker(rank, steps * step, steps, waits) for rank in range(HOSTS)),
        link_rate=draw.uniform(93e6, 95e6),
    )


def _worker(rank: int, seconds: float, steps: int, waits: float | None) -> WorkerTime:
    host, pace = f"host{rank}", _STEP * (1.08 if rank == 2 else 1.0)
    if waits is None:
        return WorkerTime(host, seconds)
    return WorkerTime(host, seconds, waits * seconds, 0.0 if waits > 0.1 else 0.4 * seconds, pace)


def _bits(score: float | None) -> float | None:
    return None if score is None else 2 + 4 * (1 - score)
