"""Measure what the strategy costs and keeps, against its contenders in the same run.

    python scripts/measure.py overhead     cost of a step between exchanges, against one device
    python scripts/measure.py ends         cost of an exchange without its way, under every rule
    python scripts/measure.py exchange     cost of an exchange with its way, on emulated hosts
    python scripts/measure.py small        cost of frequent exchanges of small parameters
    python scripts/measure.py memory       extra memory per worker, in copies of the parameters
    python scripts/measure.py server       an asynchronous center's server against an echo over gRPC

Throughput on a network is scripts/benchmark.py's. Accuracy at equal samples is that of
scripts/compare.py, against DDP at its best learning rate with preset=accuracy.
"""

from __future__ import annotations

import argparse
import logging
import os

# One thread per worker, before torch reads it; Lightning would choose by the number of devices.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from measurements.ends import ends
from measurements.exchange import exchange
from measurements.memory import memory
from measurements.overhead import overhead
from measurements.server import server
from measurements.small import small


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
    two.add_argument("--workers", type=int, default=2)
    two.add_argument("--compression", help="a codec, as of EASGDStrategy")
    three = commands.add_parser("ends", help="cost of an exchange without its way")
    three.add_argument("--millions", type=float, default=25.6, help="parameters, in millions")
    three.add_argument("--tensors", type=int, default=160, help="in how many tensors")
    three.add_argument("--device", default="cpu", help="cpu or cuda")
    three.add_argument("--repetitions", type=int, default=30)
    four = commands.add_parser("exchange", help="cost of an exchange with its way (8 minutes)")
    four.add_argument("--network", default="100mbit", help="as of scripts/benchmark.py")
    four.add_argument("--hosts", type=int, default=4, help="one worker each")
    four.add_argument("--tau", type=int, default=6, help="where exchanges hide behind τ steps")
    four.add_argument("--pairs", type=int, default=16, help="of blocks, in a repetition")
    four.add_argument("--repetitions", type=int, default=4)
    four.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "digits"))
    four.add_argument("--folder", default="outputs/exchange", help="what the hosts print")
    five = commands.add_parser("small", help="cost of frequent exchanges of small parameters")
    five.add_argument("--workers", type=int, default=2)
    five.add_argument("--below", type=int, default=100_000, help="elements, as of Often")
    five.add_argument("--steps", type=int, default=1000)
    five.add_argument("--repetitions", type=int, default=5)
    six = commands.add_parser("server", help="an asynchronous center's server against an echo")
    six.add_argument("--workers", type=int, default=4)
    six.add_argument("--megabytes", type=float, default=5.0, help="of the model")
    six.add_argument("--encrypted", action="store_true", help="with certificates on both sides")
    six.add_argument("--journal", default="none", choices=("none", "written", "synced"))
    six.add_argument("--shards", type=int, default=1, help="also several servers, a slice each")
    six.add_argument("--standby", action="store_true", help="also a server that has a standby")
    six.add_argument("--repetitions", type=int, default=9, help="pairs of server and echo")
    options = vars(parser.parse_args())
    measurements = {
        "overhead": overhead,
        "ends": ends,
        "exchange": exchange,
        "small": small,
        "memory": memory,
        "server": server,
    }
    measurements[options.pop("command")](**options)


if __name__ == "__main__":
    main()
