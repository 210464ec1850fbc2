"""Repeat what the paper found, and say what is confirmed, not confirmed or not tested.

    python scripts/reproduce.py                                  Fashion-MNIST, an hour on 2 cores
    python scripts/reproduce.py scale=full                       CIFAR-10 on GPUs, as in the paper
    python scripts/reproduce.py contender=[easgd,eamsgd,downpour]  some methods only
    python scripts/reproduce.py hydra.run.dir=FOLDER             goes on with what is left there
    python scripts/reproduce.py hydra.run.dir=FOLDER train=false   only judges what is there

Each study of conf/reproduce.yaml is a comparison in a folder of its own, as of compare.py, whose
keys can be set here, too. findings.html has each finding with the paper's words, the criterion that
was fixed before, the numbers and the figure.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from comparing.clusters import rank_on_cluster
from comparing.command import end_with_result_of, require_contenders
from comparing.comparison import Comparison
from comparing.store import Store
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from plugging import find_own_code, replace_whole
from reproducing.evidence import Study
from reproducing.page import write_page


def studies_of(cfg: DictConfig) -> dict[str, DictConfig]:
    """Configurations of the studies by name, with those of their contenders that take part.

    Raises:
        ValueError: there is none.
    """
    found = {str(name): _study(cfg, study) for name, study in cfg.studies.items()}
    found = {name: one for name, one in found.items() if one.contender}
    if not found:
        known = dict.fromkeys(name for study in cfg.studies.values() for name in study.contender)
        raise ValueError(f"contender got none of those that studies have: {', '.join(known)}.")
    return found


def _study(cfg: DictConfig, study: DictConfig) -> DictConfig:
    one = OmegaConf.merge(cfg, {key: study[key] for key in study if key != "contender"})
    # Files of conf/scale say something of contenders that were not chosen, too.
    chosen = {
        name for name, each in cfg.contender.items() if "_target_" in each.get("strategy", {})
    }
    names = [name for name in study.contender if name in chosen]
    one.contender = OmegaConf.masked_copy(cfg.contender, names)
    if isinstance(cfg.rates, DictConfig):
        one.rates = OmegaConf.masked_copy(one.rates, [name for name in names if name in one.rates])
    return one


def reproduce(cfg: DictConfig, output: Path) -> bool:
    """Run what is left of all studies, and judge what there is; whether nothing failed.

    Raises:
        ValueError: something that was asked for is impossible, or there is nothing to judge.
    """
    if rank_on_cluster() is not None:
        raise ValueError("Studies start their own workers. Run this without torchrun and srun.")
    studies = {
        output / name: Comparison(one, output / name) for name, one in studies_of(cfg).items()
    }
    if not cfg.train:
        studies = {each: one for each, one in studies.items() if Store(each).read()}
    ran: list[Path] = []
    try:
        good = [_run(studies, folder, ran) for folder in studies]
        return all(good)
    finally:
        _judge([(studies[folder].results(), Store(folder).about()) for folder in ran], output)


def _run(studies: Mapping[Path, Comparison], folder: Path, ran: list[Path]) -> bool:
    ran.append(folder)
    print(f"study {len(ran)} of {len(studies)}: {folder.name}", flush=True)
    folder.mkdir(exist_ok=True)
    return studies[folder].run()


def _judge(studies: Sequence[Study], output: Path) -> None:
    found = [study for study in studies if study[0]]
    if not found and sys.exc_info()[0] is not None:
        return  # nothing ran, for a reason that is told
    for finding, verdict in write_page(found, output):
        print(f"{verdict.outcome}: {finding.title}. {verdict.because}")
    print(output / "findings.html")


@hydra.main(version_base="1.3", config_path="../conf", config_name="reproduce")
def main(cfg: DictConfig) -> None:
    """Repeat what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # workers end, too
    output = Path(HydraConfig.get().runtime.output_dir)
    end_with_result_of(lambda: reproduce(cfg, output), f"What was found is in {output}.")


def command_line() -> None:
    """Be the repetition."""
    find_own_code(sys.argv[1:])
    sys.argv[1:] = replace_whole(sys.argv[1:])
    require_contenders(sys.argv[1:])
    main()


if __name__ == "__main__":
    command_line()
