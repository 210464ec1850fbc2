"""Test every model that a checkpoint holds: the center, the workers, their mean, and others.

    python scripts/evaluate.py outputs/2026-11-29/09-46-33

The checkpoint is a file or the folder of a run, whose configuration names module and data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from evaluating.recalling import Run, recall
from jobs import attempt, command_line, quieten, read_config, start_workers
from omegaconf import DictConfig

TITLE = "Test the center, each worker, their mean, and other models that a checkpoint holds."
COMMANDS = """\
  python scripts/evaluate.py RUN                      the best checkpoint of a run, or the newest
  python scripts/evaluate.py RUN/checkpoints/last.ckpt data.root=/other batches=50
  python scripts/evaluate.py CKPT module._target_=my.Lit data._target_=my.Data    of no run here"""

_recalled: list[Run] = []
"""What this process was started for."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate one checkpoint."""
    attempt(start, cfg)


def start(cfg: DictConfig) -> None:
    """Evaluate in a worker of its own."""
    read = read_config(cfg, also=("batches",))
    (run,) = _recalled
    print(f"checkpoint {run.checkpoint}", *run.notes(read), sep="\n", flush=True)
    start_workers(run.configuration(read), evaluate)


def evaluate(cfg: DictConfig) -> None:
    """What the worker does."""
    from evaluating.holding import Held
    from evaluating.testing import Bench

    quieten()
    bench = Bench(cfg, Held(cfg.ckpt_path))
    evaluation = bench.evaluate()
    path = Path(cfg.output_dir, "evaluation.json")
    path.write_text(json.dumps(evaluation.as_dict(), indent=2))
    print(f"\n{evaluation.table()}\n\n  {path}")


if __name__ == "__main__":
    if not {"--help", "-h"} & set(sys.argv):
        try:
            _recalled.append(recall(sys.argv[1:]))
        except ValueError as error:
            sys.exit(f"error: {error}")
        sys.argv[1:] = _recalled[0].arguments
    command_line(main, "evaluate", title=TITLE, commands=COMMANDS)
