"""WHO asks in order at every step: :class:`~lightning_easgd.exchange.exchange.Exchange`.

It keeps the ``clock``. A ``link`` brings a worker's ``difference`` to a center and moves the center
when sums arrive (``arrival``); a ``rendezvous`` says who waits for whom. What all workers agree on
by their headers is in ``agreement`` and ``stops``; the rest is what rules and schedules need to
know of the worker.

Glossary: one word for one thing, in code and documents.

    worker          a process that trains a copy of the model, x
    center          the copy that all workers share, c; in a group, g
    participant     what takes part in an exchange: a worker, or the center of its group
    subgroup        workers that sum among themselves; a ``group`` is what the user says of them
    clock           optimizer steps taken, equal on all workers at every exchange
    τ, ``tau``      the period: optimizer steps from one exchange to the next
    α, β, ρ         how strongly a worker is pulled: α = β / workers, or α = ρ η
    exchange        each worker sends its difference, and the center moves by their sum
    difference      x - c, as it is taken before the step
    contribution    what a participant adds to the sum, a multiple of its difference
    own start       where a worker stood after its latest exchange, s; some rules count from there
    pull            what the worker loses by it, α (x - c), or what its rule says instead
    residual        what a codec did not send yet; it is added to a later difference (flushed)
    cohort          parameters that joined the exchanges at the same time
    fragment        a part of a cohort that one exchange moves; its index says which
    portion         the fragments that one link exchanges
    slice           rows of a parameter that lie in one fragment
    statistics      buffers that the center has, too
    link            how a difference reaches a center, and what comes back (start, wait)
    in flight       started, and not arrived
    header          the few numbers that travel with every exchange, and what they prove
    companion       what a rule or schedule brings along that lives in the headers
    rendezvous      who waits for whom: all workers meet in a phase
    phase           where a worker is in training when it sends a header
    idle            a worker without a step to take, which waits for others at a rendezvous
    shadow          what an idle worker does: it takes part in the exchanges of the others
    rule            how the center moves, and whether a worker is pulled or reset to the center
    rule state      what a rule keeps of the center between two exchanges, as its momentum
    heartbeat       signs of life; a diagnosis says from them who is missing or stuck
    swap in, out    the module holds the center for a while, and then the worker again
"""
