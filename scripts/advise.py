"""Measure a minute of training here, and say which τ and compression to take, or to take DDP.

It takes the command line of train.py: python scripts/advise.py model=resnet trainer.devices=4
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import hydra
from jobs import attempt, command_line, read_config, start_workers
from omegaconf import DictConfig

TITLE = "Measure a minute of training, and say which τ and compression to take, or to take DDP."
COMMANDS = """\
  python scripts/advise.py                                the default run of train.py
  python scripts/advise.py data=fashion_mnist model=resnet trainer.devices=4
  python scripts/advise.py seconds=20 codecs=[int8]       a shorter measurement
"""
READ = ("seconds", "codecs", "arguments")


@hydra.main(version_base="1.3", config_path="../conf", config_name="advise")
def main(cfg: DictConfig) -> None:
    """Measure and advise once."""
    attempt(start, cfg)


def start(cfg: DictConfig) -> None:
    """Measure in workers of its own, or be one of them."""
    start_workers(read_config(cfg, also=READ), run)


def run(cfg: DictConfig) -> None:
    """What one worker does."""
    from advising.judging import Advice
    from advising.measuring import Bench, measure
    from advising.report import command, table
    from advising.small import small

    from lightning_easgd.communication import leave_all_groups

    bench = Bench(cfg)
    advice = Advice(measure(bench, cfg.seconds, cfg.codecs))
    if bench.is_rank_zero:
        print(f"\n{table(advice)}\n\n  {command(advice, cfg.arguments)}")
    if bench.writes:
        found = {**advice.as_dict(), "often": [asdict(each) for each in small(advice)]}
        Path(cfg.output_dir, "advice.json").write_text(json.dumps(found, indent=2))
    leave_all_groups()


if __name__ == "__main__":
    command_line(main, "advise", title=TITLE, commands=COMMANDS)
