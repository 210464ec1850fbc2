"""Measure what the strategy costs and keeps, against its contenders in the same run.

    python scripts/measure.py overhead     cost of a step between exchanges, against one device
    python scripts/measure.py memory       extra memory per worker, in copies of the parameters
    python scripts/measure.py accuracy     Fashion-MNIST: center against DDP, at equal samples

Throughput on a network is scripts/benchmark.py's.
"""

from __future__ import annotations

import argparse
import logging
import os

# One thread per worker, before torch reads it; Lightning would choose by the number of devices.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from measurements.accuracy import accuracy
from measurements.memory import memory
from measurements.overhead import overhead


def main() -> None:
    """Parse the command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    one = commands.add_parser("overhead", help="cost of a step between exchanges")
    one.add_argument("--repetitions", type=int, default=7)
    two = commands.add_parser("memory", help="extra memory per worker")
    two.add_argument("--millions", type=int, default=128, help="parameters, in millions")
    three = commands.add_parser("accuracy", help="Fashion-MNIST against DDP (half an hour)")
    three.add_argument("--seeds", type=int, default=3)
    three.add_argument("--folder", default="outputs/accuracy", help="finished runs are kept here")
    options = vars(parser.parse_args())
    measurements = {"overhead": overhead, "memory": memory, "accuracy": accuracy}
    measurements[options.pop("command")](**options)


if __name__ == "__main__":
    main()
