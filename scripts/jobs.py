"""What the scripts with workers have in common: one job of them, or a sweep of jobs, under Hydra.

The process that the user starts composes the configuration and starts the same script again as its
workers, which read it from a file; under torchrun, srun and the like every process is a worker.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import configs
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from launching import WorkerError, run_workers
from omegaconf import DictConfig, OmegaConf
from parting import watch_lifeline
from plugging import find_own_code, needed, replace_whole

Result = TypeVar("Result")

WORKER = "--worker"
"""The argument by which a run starts its script as one of its workers."""

failed: list[str] = []
"""The jobs of a sweep that failed, and why, a line each."""


def attempt(start: Callable[[DictConfig], Result], cfg: DictConfig) -> Result | None:
    """Do one job, and report if it fails; None then, if it is one of a sweep."""
    try:
        return start(cfg)
    except WorkerError as error:  # its traceback stands above
        report_failure(str(error))
    except Exception as error:
        traceback.print_exc()
        report_failure(f"{type(error).__name__}: {error}")
    return None


def start_workers(cfg: DictConfig, script: str) -> Path:
    """Run a script as the workers that ``cfg.trainer`` asks for; the folder of the job."""
    output = Path(HydraConfig.get().runtime.output_dir)
    config = output / "config.yaml"
    configs.save(cfg, config)
    devices = cfg.trainer.devices
    workers = devices if isinstance(devices, int) and devices > 0 else count_devices(cfg)
    command = [sys.executable, script, WORKER, str(config)]
    run_workers(command, workers=workers, nodes=cfg.trainer.num_nodes, logs=output)
    return output


def read_config(cfg: DictConfig, *, also: Sequence[str] = ()) -> DictConfig:
    """What a job reads of what Hydra composed.

    Raises:
        ValueError: something was set that has no effect.
    """
    return needed(cfg, HydraConfig.get().overrides.task, also=also)


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


def quieten() -> None:
    """Leave out Lightning's tip to install its makers' service."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


def refuse_what_is_gone(arguments: Iterable[str]) -> None:
    """End the program where a key of earlier configurations is set, with what is written now."""
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        if (bound := {"strategy.tau_min": "min", "strategy.tau_max": "max"}.get(key)) is not None:
            sys.exit(
                f"{argument}: there is no such key any more. Write vary=auto"
                f" strategy.tau.{bound}={value or 'N'} instead, or in a file of your own tau:"
                f" {{_target_: lightning_easgd.Auto, {bound}: {value or 'N'}}}."
            )


def command_line(main: Callable[[], Any], run: Callable[[DictConfig], Any]) -> None:
    """Be a worker, a job, or a sweep, whose failed jobs are listed at its end.

    Args:
        main: what Hydra decorated.
        run: what one worker does.
    """
    refuse_what_is_gone(sys.argv[1:])
    try:
        if sys.argv[1:2] == [WORKER]:
            _work(run, sys.argv[2])
        else:
            find_own_code(sys.argv[1:])
            sys.argv[1:] = replace_whole(sys.argv[1:])
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


def _work(run: Callable[[DictConfig], Any], config: str) -> None:
    watch_lifeline()
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    try:
        run(cfg)
    except InstantiationException as error:
        raise error.__cause__ or error from None  # one traceback, which ends with the reason
