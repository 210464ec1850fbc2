"""What the scripts with workers have in common: one job of them, or a sweep of jobs, under Hydra.

The process that the user starts composes the configuration, imports what it names, checks it, and
forks the workers; under torchrun, srun and the like every process is a worker.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import answering
import configs
import helping
import sweeping
from answering import cause, explain
from forking import write_to
from going_on import advice
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from launching import WorkerError, log_of, rank_of_worker, run_workers, writes_to_terminal
from omegaconf import DictConfig, OmegaConf
from parting import leave_with_parent
from plugging import find_own_code, flags_first, needed, replace_whole

Result = TypeVar("Result")


def attempt(start: Callable[[DictConfig], Result], cfg: DictConfig) -> Result | None:
    """Do one job, and report if it fails; None then, if it is one of a sweep."""
    began = time.time()
    try:
        result = start(cfg)
    except Exception as error:
        report_failure(error, cfg, began)
        return None
    except (KeyboardInterrupt, SystemExit) as stop:
        if told := advice(cfg):
            how = "by Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "by SIGTERM"
            told = f"The run was stopped {how}.\n{told}"
            print(f"\n{told}", file=sys.stderr)
            Path(HydraConfig.get().runtime.output_dir, "stopped.log").write_text(f"{told}\n")
        raise
    sweeping.record(began, objective=result)
    return result


def start_workers(cfg: DictConfig, run: Callable[[DictConfig], Result]) -> list[Result]:
    """Call ``run`` in the workers that ``cfg.trainer`` asks for, or be one that a launcher started.

    Returns:
        What each of them returned.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # look for GPUs without CUDA, to fork
    from checking import check, count_workers

    output = Path(HydraConfig.get().runtime.output_dir)
    if not (rank := rank_of_worker()):
        configs.save(cfg, output / "config.yaml")
    if rank is not None:
        return [_be_worker(run, cfg, rank, output)]
    workers = count_workers(cfg)
    check(cfg)
    cfg = OmegaConf.create(configs.resolved(cfg))
    return run_workers(_work, run, cfg, workers=workers, nodes=cfg.trainer.num_nodes, logs=output)


def _be_worker(
    run: Callable[[DictConfig], Result], cfg: DictConfig, rank: int, output: Path
) -> Result:
    """A worker that torchrun or the like started: all but the first write to a file."""
    from checking import check
    from torch.distributed.elastic.multiprocessing.errors import record

    if rank:
        write_to(log_of(rank, output))
    check(cfg)
    return record(run)(cfg)  # torchrun names the first that failed, and its error


def read_config(cfg: DictConfig, *, also: Sequence[str] = ()) -> DictConfig:
    """What a job reads of what Hydra composed.

    Raises:
        ValueError: something was set that has no effect.
    """
    return needed(cfg, HydraConfig.get().overrides.task, also=also)


def report_failure(error: Exception, cfg: DictConfig, began: float) -> None:
    """Say which job failed, and why, in a line; the end of the program, unless it is a sweep.

    If it failed in training, further lines say what is there to go on with.
    """
    hydra_cfg = HydraConfig.get()
    answering.write_traceback(error, Path(hydra_cfg.runtime.output_dir))
    message = explain(error, hydra_cfg.job.config_name, hydra_cfg.overrides.task)
    if not sweeping.is_sweep():
        sys.exit(f"error: {message}{_further(error, cfg)}")
    sweeping.record(began, error=message)
    print(f"error: job {hydra_cfg.job.num}: {message}{_further(error, cfg)}", file=sys.stderr)


def _further(error: Exception, cfg: DictConfig) -> str:
    """Where the traceback is, and how the run goes on, if it came as far as that."""
    if not isinstance(error, WorkerError) and rank_of_worker() is None:
        return ""  # no worker was started
    told = advice(cfg)
    traced = bool(told)
    if isinstance(error, WorkerError):
        traced = bool(error.outcome.trace) and (traced or not error.alike)
    log = f"  traceback   {HydraConfig.get().runtime.output_dir}/error.log"
    return "".join(f"\n{line}" for line in (log * traced, told) if line)


def quieten() -> None:
    """Have Lightning speak as without Hydra, and without its tip to install its makers' service."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_easgd"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [logging.StreamHandler()]
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


def command_line(main: Callable[[], Any], config: str, *, title: str, commands: str) -> None:
    """Be a job, or a sweep, which ends with the table of its jobs.

    Args:
        main: what Hydra decorated.
        config: its file of conf/, without .yaml.
        title: what the script does, for --help.
        commands: the usual ones, for --help.
    """
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(helping.text(title, commands, config))
        return
    refuse_what_is_gone(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # what Hydra meets is said here
    try:
        find_own_code(arguments)
        sys.argv[1:] = flags_first(replace_whole(arguments))
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if answering.FULL:
            raise
        # Without a folder yet, workers that a launcher started all meet the same.
        sys.exit(f"error: {explain(error, config, arguments)}" if writes_to_terminal() else 1)
    finally:
        succeeded = sweeping.close()
    if not succeeded:
        sys.exit(1)


def _work(_: int, run: Callable[[DictConfig], Result], cfg: DictConfig) -> Result:
    """What one worker does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ends training by it
    leave_with_parent()
    try:
        return run(cfg)
    except InstantiationException as error:
        raise cause(error) from None
    finally:
        atexit._run_exitfuncs()  # as at the end of a process that was not forked
