"""Train a model under elastic averaging (or DDP, or alone) and report what it cost and reached.

Every key of conf/ can be set: python scripts/train.py model=resnet strategy.tau=16
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.utils import instantiate
from jobs import attempt, command_line, quieten, read_config, start_workers
from omegaconf import DictConfig
from plugging import several
from searching import Rivals

TITLE = "Train a model under elastic averaging (or DDP, or alone), and report cost and result."
COMMANDS = """\
  python scripts/train.py                                         four workers on the digits
  python scripts/train.py data=fashion_mnist model=cnn tau=16     other data, and rarer exchanges
  python scripts/train.py module._target_=my.Lit data._target_=my.Data    your own classes
  python scripts/train.py -m strategy=easgd,diloco,ddp tau=4,16   a sweep over all combinations
  python scripts/train.py ckpt_path=RUN/checkpoints/last.ckpt hydra.run.dir=RUN    go on with a run
"""

if TYPE_CHECKING:
    from lightning_easgd.workloads.report import Report


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one job; its objective, for sweepers that optimize it. None if the job failed."""
    return attempt(start, cfg)


def start(cfg: DictConfig) -> float | None:
    """Run one job in workers of its own, or be one of them."""
    if cfg.test and not cfg.train and cfg.ckpt_path is None:
        raise ValueError("train=false got nothing to test. Set ckpt_path=PATH, or test=false.")
    from objective import objective

    read = read_config(cfg)
    reports = start_workers(read, partial(run, rivals=Rivals.of_this_job()))
    return objective(read.objective, asdict(reports[0]))


def run(cfg: DictConfig, *, rivals: Rivals | None = None) -> Report:
    """What one worker does."""
    from objective import Prune, Sought
    from progress import Progress

    from lightning_easgd.communication import leave_all_groups
    from lightning_easgd.workloads import experiment

    quieten()
    experiment.seed(cfg.seed)
    datamodule = instantiate(cfg.data) if cfg.get("data") else None
    module = instantiate(cfg.module)
    strategy, logger = instantiate(cfg.strategy), several(cfg.get("logger")) or False
    checkpoint = instantiate(cfg.checkpoint) if cfg.trainer.enable_checkpointing else None
    progress = Progress(Path(cfg.output_dir))
    prune = [Prune(cfg.objective, rivals)] if rivals else []
    callbacks = [
        progress,
        *experiment.callbacks(strategy, checkpoint, cfg.seed),
        *([Sought(cfg.objective, tested=cfg.test)] if cfg.objective and cfg.train else []),
        *prune,
        *several(cfg.get("callbacks")),
        *several(cfg.trainer.get("callbacks")),
    ]
    trainer = instantiate(cfg.trainer, strategy=strategy, logger=logger, callbacks=callbacks)
    if cfg.train:
        progress.begin(trainer)
    report = experiment.run(
        trainer,
        module,
        datamodule,
        train=cfg.train,
        test=cfg.test,
        ckpt_path=cfg.ckpt_path,
        pruned=lambda: any(each.pruned for each in prune),
    )
    if trainer.is_global_zero:
        print(report.table())
    if trainer.local_rank == 0:
        Path(cfg.output_dir, "report.json").write_text(report.to_json())
    leave_all_groups()  # under DDP too, which does not
    if trainer.is_global_zero and cfg.train:
        draw_curves(Path(cfg.output_dir))
    return report


def draw_curves(folder: Path) -> None:
    """Draw ``curves.png``, if the run has logged a table; a picture is no reason to fail."""
    try:
        from seeing.curves import draw

        draw(folder)
    except Exception as error:
        print(f"{folder}/curves.png was not drawn: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main, "train", title=TITLE, commands=COMMANDS)
