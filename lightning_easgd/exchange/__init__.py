"""WHO asks in order at every step: :class:`~lightning_easgd.exchange.exchange.Exchange`.

It keeps the ``clock``. A ``link`` brings a worker's ``difference`` to a center and moves the center
when sums arrive (``arrival``); a ``rendezvous`` says who waits for whom. What all workers agree on
by their headers is in ``agreement`` and ``stops``; the rest is what rules and schedules need to
know of the worker.
"""
