"""Compare ways to train together: samples/s, bytes, waits, memory, on one network after another.

    python scripts/benchmark.py network=100mbit hosts=4 contender=[limit,ddp,easgd]
    python scripts/benchmark.py sweep=bandwidth      10 Mbit/s to unlimited
    python scripts/benchmark.py sweep=workers        2, 4, 8 and 16 hosts
    python scripts/benchmark.py sweep=jitter         workers that stall at random

Hosts are emulated on this machine (Linux, root, iproute2); started by torchrun, it runs on
those of a real cluster. Every key of conf/benchmark.yaml can be set. A run that is started again
with its folder (hydra.run.dir=FOLDER) goes on with what is left; minutes=8 stops it in time for
that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from comparing.command import end_with_result_of, require_contenders
from comparing.contender import FOLDER, named
from comparing.speed import Benchmark
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Compare what was asked for."""
    chosen = HydraConfig.get()
    by_name = bool(named(chosen.overrides.task, FOLDER))
    output = Path(chosen.runtime.output_dir)
    end_with_result_of(
        lambda: Benchmark(cfg, output, by_name=by_name).run(),
        f"What was measured is in {output}.",
    )


def command_line() -> None:
    """Be the benchmark."""
    require_contenders(sys.argv[1:])
    main()


if __name__ == "__main__":
    command_line()
