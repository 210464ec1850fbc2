"""Serve a center to workers that come at their own pace, and show them in a table.

    python scripts/serve.py folder=outputs/center tau=10 beta=0.9
    python scripts/serve.py keys center-keys server site-a site-b

The folder keeps snapshots; started again, the server goes on. The first worker that comes brings
the model and its weights. What the table shows is written to served.jsonl in the folder, too.
Ctrl-C or SIGTERM ends the server after a last snapshot.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from serving import SECONDS, Shown, Watched, to_tensorboard
from sharding import Shards

from lightning_easgd.algorithms import MDownpour
from lightning_easgd.schedules.checks import is_number, require, require_count
from lightning_easgd.server import Limits, Settings, SnapshotError
from lightning_easgd.server.certificates import Certificates, ShutOut
from lightning_easgd.server.memory import keep_memory
from lightning_easgd.server.shards import address_of

if TYPE_CHECKING:
    from lightning_easgd.server.serving import Serving

CONF = Path(__file__).parents[1] / "conf" / "serve.yaml"
SHUT_OUT = "shut_out.txt"
TEXT = {"folder", "address", "keys", "standby_of", "shard"}
"""Keys whose values are taken as they are written."""
COMMANDS = """\
Serve a center to workers that come at their own pace, and show them in a table.

  python scripts/serve.py                                            workers of this machine
  python scripts/serve.py address=0.0.0.0:5700 keys=center-keys      and others, with certificates
  python scripts/serve.py folder=outputs/standby standby_of=host:5700    take over if host is lost
  python scripts/serve.py shards=2                                   two servers, half a center each
  python scripts/serve.py keys center-keys server site-a             make keys; see keys -h

KEY=VALUE, and what it is if you say nothing:
"""


def main() -> None:
    """Read the command line, and serve or make keys."""
    arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & {*arguments[:1]}:
            print(COMMANDS + "".join(f"  {line}\n" for line in _lines()), end="")
        elif arguments[:1] == ["keys"]:
            make_keys(arguments[1:])
        else:
            serve(read(arguments))
    except (OSError, ValueError, RuntimeError, SnapshotError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def serve(options: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    ends = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ends.set())
    writer = to_tensorboard(options.folder / "tensorboard") if options.tensorboard else None
    served: Watched | Shards
    if options.shards > 1 and options.shard is None:
        settings_of(options, 0)  # what is refused is refused before processes start
        served = Shards(partial(start, options), options.shards)
    else:
        served = Watched(start(options, options.shard or 0))
    print(f"serving on port {served.port}; Ctrl-C ends after a snapshot", flush=True)
    try:
        with Shown(options.folder / "served.jsonl", writer) as shown:
            while not ends.wait(SECONDS):
                shown.show(served.look())
    finally:
        served.close()


def settings_of(options: argparse.Namespace, shard: int) -> Settings:
    """Of the server of a shard, which is all of the center if there is one only."""
    algorithm, momentum = options.algorithm, options.momentum
    has_momentum = momentum is None or algorithm == "mdownpour"
    require("momentum", momentum, "null, or with algorithm=mdownpour a number", has_momentum)
    lease = options.worker_lease
    require("worker_lease", lease, "a positive number", is_number(lease) and lease > 0)
    return Settings(
        algorithm=algorithm if momentum is None else MDownpour(momentum),
        center_average=options.center_average,
        tau=options.tau,
        beta=options.beta,
        workers=options.workers,
        staleness=options.staleness,
        weight=options.weight,
        max_norm=options.max_norm,
        lease=lease,
        limits=Limits(options.most_workers, options.most_bytes, options.most_per_second),
        shard=shard,
        shards=options.shards,
    )


def start(options: argparse.Namespace, shard: int) -> Serving:
    """The server of a shard."""
    from lightning_easgd.server.serving import Pairing, Serving

    certificates = None
    if options.keys:
        names = ("authority.pem", "server.pem", "server.key")
        certificates = Certificates(*(options.keys / name for name in names))
    standby_of = options.standby_of and address_of(options.standby_of, shard)
    return Serving(
        settings_of(options, shard),
        options.folder / f"shard-{shard}" if shard else options.folder,
        address=address_of(options.address, shard),
        seconds=options.seconds,
        adds=options.adds,
        journal=options.journal,
        pairing=Pairing(standby_of, alone=options.alone, lease=options.lease),
        certificates=certificates,
        shut_out=ShutOut(options.keys / SHUT_OUT) if options.keys else None,
        insecure=options.insecure,
    )


def read(arguments: list[str]) -> argparse.Namespace:
    """The options of a server.

    Raises:
        ValueError: one is not KEY=VALUE, or there is no such key.
    """
    options: dict[str, Any] = yaml.safe_load(CONF.read_text())
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument} cannot be read. Write KEY=VALUE; --help lists the keys.")
        if key not in options:
            near = "".join(f" Did you mean {name}?" for name in get_close_matches(key, options, 1))
            raise ValueError(f"There is no key {key}.{near} --help lists the keys.")
        options[key] = value if key in TEXT and value != "null" else _value(argument, value)
    for name in ("folder", "keys"):
        options[name] = options[name] and Path(options[name])
    _read_shards(options)
    return argparse.Namespace(**options)


def _read_shards(options: dict[str, Any]) -> None:
    """How many there are, and which of them is served; "1/2" is the second of two."""
    require_count("shards", options["shards"], "shards")
    if options["shard"] is not None:
        number, _, shards = options["shard"].partition("/")
        known = number.isdecimal() and shards.isdecimal() and int(number) < int(shards)
        require("shard", options["shard"], "as 0/2 and 1/2, the first and second of two", known)
        options["shard"], options["shards"] = int(number), int(shards)
    free = options["address"].endswith(":0") and options["shards"] > 1
    require(
        "address", options["address"], "with several shards a port, as 127.0.0.1:5700", not free
    )


def _value(argument: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"{argument} cannot be read. Write KEY=VALUE.") from None


def _lines() -> list[str]:
    """Each key with its value, and what it means."""
    pairs = [line.split("  # ") for line in CONF.read_text().splitlines()[1:]]
    given = [(pair[0].replace(": ", "="), pair[1]) for pair in pairs]
    width = max(len(left) for left, _ in given)
    return [f"{left:<{width}}  {comment}" for left, comment in given]


def make_keys(arguments: list[str]) -> None:
    """Make certificates, or shut a site out."""
    parser = argparse.ArgumentParser(
        prog="serve.py keys", description="Make keys and certificates, or shut a site out."
    )
    parser.add_argument("folder", type=Path, help="of the authority, made if it is not there")
    parser.add_argument("names", nargs="*", help="server, and one for each site")
    parser.add_argument("--shut-out", action="append", default=[], metavar="NAME")
    options = parser.parse_args(arguments)
    from lightning_easgd.server.keys import make_certificates

    for name in options.names:
        made = make_certificates(options.folder, name)
        print(f"{name}: give it {made.authority}, {made.certificate} and {made.key}, no other file")
    if options.shut_out:
        path = options.folder / SHUT_OUT
        with open(path, "a") as file:
            file.writelines(f"{name}\n" for name in options.shut_out)
        print(f"shut out at once: {', '.join(options.shut_out)} ({path})")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    keep_memory()
    main()
