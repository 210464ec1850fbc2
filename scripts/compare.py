"""Compare ways to train together: time to a score, the score at the end, and bytes.

    python scripts/compare.py                                    DDP, EASGD, EAMSGD, DOWNPOUR
    python scripts/compare.py data=fashion_mnist contender=[ddp,ddp_bf16,easgd] taus=[4,16]
    python scripts/compare.py network=100mbit                    on emulated hosts
    python scripts/compare.py preset=accuracy                    against DDP, at the best of three η
    python scripts/compare.py data=text                          a small GPT, bits per byte
    python scripts/compare.py hydra.run.dir=FOLDER               goes on with what is left there
    python scripts/compare.py hydra.run.dir=FOLDER train=false   only shows what is there

Every key of conf/compare.yaml can be set; contenders are files of conf/contender. Diverging is
a result, too. A contender that fails is left out, and the others go on. What was found with
other settings stays in the folder and is not counted.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from comparing.command import end_with_result_of, require_contenders
from comparing.comparison import Comparison
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from plugging import find_own_code, replace_whole


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Compare what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # workers end, too
    output = Path(HydraConfig.get().runtime.output_dir)
    end_with_result_of(lambda: Comparison(cfg, output).run(), f"What was found is in {output}.")


def command_line() -> None:
    """Be the comparison."""
    find_own_code(sys.argv[1:])
    sys.argv[1:] = replace_whole(sys.argv[1:])
    require_contenders(sys.argv[1:])
    main()


if __name__ == "__main__":
    command_line()
