"""Train a model under elastic averaging (or DDP, or alone) and report what it cost and reached.

Every key of conf/ can be set: python scripts/train.py model=resnet strategy.tau=16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from launching import is_worker, run_workers
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning_easgd.workloads.experiment import Report


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one job; its test accuracy, for sweepers that optimize it."""
    if is_worker():
        return run(cfg).test_accuracy
    output = Path(HydraConfig.get().runtime.output_dir)
    OmegaConf.save(cfg, output / "config.yaml")
    command = [
        *(sys.executable, __file__, "--config-path", str(output.resolve())),
        *("--config-name", "config", f"hydra.run.dir={quote(output)}", "hydra.output_subdir=null"),
        *("hydra/job_logging=none", "hydra/hydra_logging=none"),
    ]
    devices = cfg.trainer.devices
    workers = devices if isinstance(devices, int) and devices > 0 else count_devices(cfg)
    run_workers(command, workers=workers, nodes=cfg.trainer.num_nodes, logs=output)
    return json.loads((output / "report.json").read_text())["test_accuracy"]


def quote(path: Path) -> str:
    """A path as a value on Hydra's command line."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def count_devices(cfg: DictConfig) -> int:
    """The number of workers per node that ``trainer.devices=auto``, -1 or a list stands for."""
    from lightning.pytorch import Trainer

    devices = OmegaConf.to_object(cfg.trainer)["devices"]
    return Trainer(accelerator=cfg.trainer.accelerator, devices=devices, logger=False).num_devices


def run(cfg: DictConfig) -> Report:
    """What one worker does."""
    from lightning_easgd.communication import leave_all_groups
    from lightning_easgd.workloads import experiment

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


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
