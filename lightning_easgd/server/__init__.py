"""A center behind a server, to which workers come at their own pace, and which can be lost.

    worker i, own clock t: if τ | t:  get c ;  d = α (x - c) ;  send d ;  server: c <- c + d
                                      x <- x - d  after the local step

That is asynchronous EASGD: Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, Alg. 1 and 2. Nothing
in this folder knows of Lightning or of collectives. ``CenterServer`` is one pure object; it has no
socket, no thread and no clock, so all that must be right is tested without them.

    incarnation   of a worker: one process of that name; a later one has a larger number
    sequence      of a difference: 1, 2, ... in an incarnation; a difference is added once
    version       of the center: how many differences it has taken in
    staleness     of a difference: versions between the center that its worker last got and it
    refusal       what was asked cannot be done; the center is unchanged
    terms         what a worker takes from the server when it joins: algorithm, τ, α
"""

from lightning_easgd.server.center_server import CenterServer
from lightning_easgd.server.refusal import Refusal, Refused
from lightning_easgd.server.settings import Limits, Settings
from lightning_easgd.server.values import Receipt, Snapshot, SnapshotError, Terms

__all__ = [
    "CenterServer",
    "Limits",
    "Receipt",
    "Refusal",
    "Refused",
    "Settings",
    "Snapshot",
    "SnapshotError",
    "Terms",
]
