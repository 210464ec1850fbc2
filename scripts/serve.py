"""Serve a center to workers that come at their own pace, and show them in a table.

    python scripts/serve.py outputs/center --tau 10 --beta 0.9
    python scripts/serve.py outputs/center --address 0.0.0.0:5700 --keys center-keys
    python scripts/serve.py keys center-keys server site-a site-b
    python scripts/serve.py keys center-keys --shut-out site-b

The folder keeps the snapshots; started again, the server goes on from the newest one. The first
worker that comes brings the model and its weights. What the table shows is written to served.jsonl
in the folder, too. Ctrl-C or SIGTERM ends the server after a last snapshot.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from serving import Shown

from lightning_easgd.server import Limits, Settings, SnapshotError
from lightning_easgd.server.certificates import Certificates, ShutOut

SHUT_OUT = "shut_out.txt"


def main() -> None:
    """Parse the command line, and serve or make keys."""
    try:
        if sys.argv[1:2] == ["keys"]:
            make_keys(sys.argv[2:])
        else:
            serve(sys.argv[1:])
    except (OSError, ValueError, SnapshotError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def serve(arguments: list[str]) -> None:
    """Serve until a signal comes."""
    options = read(arguments)
    from lightning_easgd.server.serving import Pairing, Serving

    settings = Settings(
        algorithm=options.algorithm,
        center_average=options.center_average,
        tau=options.tau,
        beta=options.beta,
        workers=options.workers,
        staleness=options.staleness,
        weight=options.weight,
        max_norm=options.max_norm,
        limits=Limits(workers=options.most_workers),
    )
    shown = None
    if options.keys:
        names = ("authority.pem", "server.pem", "server.key")
        shown = Certificates(*(options.keys / name for name in names))
    ends = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ends.set())
    serving = Serving(
        settings,
        options.folder,
        address=options.address,
        seconds=options.seconds,
        journal=options.journal,
        pairing=Pairing(options.standby_of, alone=options.alone, lease=options.lease),
        certificates=shown,
        shut_out=ShutOut(options.keys / SHUT_OUT) if options.keys else None,
        insecure=options.insecure,
    )
    try:
        Shown(serving, options.folder / "served.jsonl").until(ends)
    finally:
        serving.close()


def read(arguments: list[str]) -> argparse.Namespace:
    """The options of a server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the snapshots")
    add("--address", default="127.0.0.1:5700", help="host and port")
    add("--keys", type=Path, help="folder of the certificates, for another address")
    add("--insecure", action="store_true", help="another address without certificates")
    add("--algorithm", default="easgd", help="easgd, downpour or mdownpour")
    add("--center-average", help="polyak or ema")
    add("--tau", type=int, default=10, help="τ, steps between two exchanges")
    add("--beta", type=float, default=0.9, help="β = pα, in (0, 1)")
    add("--workers", type=_count, default="live", help="p, or live: those that are there")
    add("--staleness", default="none", help="scale: a late difference counts less")
    add("--weight", default="none", help="samples: a difference of more samples counts more")
    add("--max-norm", type=float, help="of a difference; a larger one is shortened")
    add("--most-workers", type=int, default=256, help="that may be there at a time")
    add("--seconds", type=float, default=30.0, help="between two snapshots")
    add("--standby-of", help="host and port of the server whose place this one takes if it is lost")
    add("--alone", action="store_true", help="the standby of this server is gone for good")
    add("--lease", type=float, default=5.0, help="seconds of silence before a standby takes over")
    add("--journal", default="written", help="written, synced or none: what survives a sudden end")
    return parser.parse_args(arguments)


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


def _count(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    main()
