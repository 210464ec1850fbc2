"""Compare update rules by what their centers are worth, at equal samples, over the period τ.

    python scripts/compare.py                                    all contenders, τ and seeds
    python scripts/compare.py taus=[4,16] seeds=1 compared=[easgd,downpour]
    python scripts/compare.py preset=accuracy                    against DDP, at the best of three η
    python scripts/compare.py rates=[0.1,0.2] compared=[easgd]   tries both, and takes the better
    python scripts/compare.py hydra.run.dir=FOLDER               goes on with what is left there
    python scripts/compare.py hydra.run.dir=FOLDER train=false   only shows what is there

Every key of conf/compare.yaml can be set; contenders are files of conf/compared. Diverging is
a result, too. A contender that fails is left out, and the others go on. What was found with
other settings stays in the folder and is not counted.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from comparing.comparison import Comparison
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Compare what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # workers end, too
    output = Path(HydraConfig.get().runtime.output_dir)
    try:
        if not Comparison(cfg, output).run():
            sys.exit(1)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nStopped. What was found is in {output}.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
