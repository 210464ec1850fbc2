"""WHO asks in order at every step: :class:`~lightning_easgd.exchange.exchange.Exchange`.

A worker's ``contribution``, the exchange in ``transit``, what all workers agree on by their headers
(``agreement``), and what rules and schedules need to know of the worker.
"""
