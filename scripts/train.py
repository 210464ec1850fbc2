"""Train a model under elastic averaging (or DDP, or alone) and report what it cost and reached.

Every key of conf/ can be set: python scripts/train.py model=resnet strategy.tau=16
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from launching import WorkerError, is_worker, run_workers
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_easgd.workloads.experiment import Report

WORKER = "--worker"
"""The argument by which a run starts this script as one of its workers."""

failed: list[str] = []
"""The jobs of a sweep that failed, and why, a line each."""


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one job; its test accuracy, for sweepers that optimize it. None if the job failed."""
    if is_worker():
        return run(cfg).test_accuracy
    try:
        return start(cfg)
    except WorkerError as error:  # its traceback stands above
        report_failure(str(error))
    except Exception as error:
        traceback.print_exc()
        report_failure(f"{type(error).__name__}: {error}")
    return None


def start(cfg: DictConfig) -> float | None:
    """Run one job in workers of its own."""
    if cfg.test and not cfg.train and cfg.ckpt_path is None:
        raise ValueError("train=false got nothing to test. Set ckpt_path=PATH, or test=false.")
    output = Path(HydraConfig.get().runtime.output_dir)
    config = output / "config.yaml"
    OmegaConf.save(cfg, config, resolve=True)
    devices = cfg.trainer.devices
    workers = devices if isinstance(devices, int) and devices > 0 else count_devices(cfg)
    command = [sys.executable, __file__, WORKER, str(config)]
    run_workers(command, workers=workers, nodes=cfg.trainer.num_nodes, logs=output)
    return json.loads((output / "report.json").read_text())["test_accuracy"]


def report_failure(reason: str) -> None:
    """Say which job failed; the end of the program, unless it is a sweep."""
    hydra_cfg = HydraConfig.get()
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    name = f"job {hydra_cfg.job.num}" if sweep else "the run"
    overrides = " ".join(hydra_cfg.overrides.task)
    message = f"{name} [{overrides}] in {hydra_cfg.runtime.output_dir} failed: {reason}"
    if not sweep:
        sys.exit(message)
    print(message, file=sys.stderr)
    failed.append(message.splitlines()[0])


def count_devices(cfg: DictConfig) -> int:
    """The number of workers per node that ``trainer.devices=auto``, -1 or a list stands for."""
    from lightning.pytorch import Trainer

    devices = OmegaConf.to_object(cfg.trainer)["devices"]
    return Trainer(accelerator=cfg.trainer.accelerator, devices=devices, logger=False).num_devices


def run(cfg: DictConfig) -> Report:
    """What one worker does."""
    from lightning_easgd.communication import leave_all_groups
    from lightning_easgd.workloads import experiment

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)
    experiment.seed(cfg.seed)
    datamodule, module = instantiate(cfg.data), instantiate(cfg.module)
    strategy, logger = instantiate(cfg.strategy), instantiate(cfg.logger)
    checkpoint = instantiate(cfg.checkpoint) if cfg.trainer.enable_checkpointing else None
    callbacks = experiment.callbacks(strategy, checkpoint, cfg.seed)
    trainer = instantiate(cfg.trainer, strategy=strategy, logger=logger, callbacks=callbacks)
    report = experiment.run(
        trainer, module, datamodule, train=cfg.train, test=cfg.test, ckpt_path=cfg.ckpt_path
    )
    if trainer.is_global_zero:
        print(report.table())
    if trainer.local_rank == 0:
        Path(cfg.output_dir, "report.json").write_text(report.to_json())
    leave_all_groups()  # under DDP too, which does not
    return report


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether it is not Lightning's tip to install its makers' service."""
    return "litlogger" not in record.getMessage()


def work(config: str) -> None:
    """Be one of the workers that a run starts."""
    try:
        run(OmegaConf.load(config))
    except InstantiationException as error:
        raise error.__cause__ or error from None  # one traceback, which ends with the reason


def command_line() -> None:
    """Be a worker, a run, or a sweep, whose failed jobs are listed at its end."""
    try:
        if sys.argv[1:2] == [WORKER]:
            work(sys.argv[2])
        else:
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if failed:
            print(
                f"{len(failed)} job(s) of the sweep failed:", *failed, sep="\n  ", file=sys.stderr
            )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command_line()
