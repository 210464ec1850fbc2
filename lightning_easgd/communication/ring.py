"""Collectives on host memory, around a ring of connections, that leave training alone.

[Note: ring] Each of p workers sends to the next one and receives from the one before. A tensor is
cut into p chunks. In p-1 steps every chunk goes around and each worker adds its own part; in p-1
more the sums go around. So each worker moves 2 (p-1)/p of the tensor, however many there are
(Patarasuk and Yuan 2009), and as one worker makes the sum of a chunk, all get the same bits.

[Note: wake-ups] The sum travels while training has the processors. What takes these from it is less
the copying than the waking: a switch of threads, cold caches, the interpreter's lock. So the thread
is woken when a whole piece has arrived, not by every packet of it (SO_RCVLOWAT), and hands a piece
to the kernel at once. gloo, which is woken by packets, takes about twice the time of a processor.

[Note: patience] A kernel may fail to say that what was asked for has arrived, when the window is
nearly full. Whatever is there is taken after a while, so that such a wait has an end.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import torch
from torch import Tensor

_PIECE_BYTES = 2**20
"""What is waited for at once, and the scratch memory of a ring."""
_PATIENCE_MILLISECONDS = 200
_END_SECONDS = 5.0


class RingWork:
    """Something that goes around; waited for like a collective of torch's.

    Args:
        function: does this worker's part of it, in the ring's thread.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function
        self._over = threading.Event()
        self._error: Exception | None = None

    def is_completed(self) -> bool:
        """Whether it is over, or an error was met."""
        return self._over.is_set()

    def wait(self) -> None:
        """Wait until it is over.

        Raises:
            OSError: a neighbour left, or the ring was closed.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error

    def run(self, broken: Exception | None) -> Exception | None:
        """Do it, unless the ring is broken; why the ring is broken now."""
        assert self._function is not None
        try:
            if broken is None:
                self._function()
        except Exception as error:
            broken = error
        self._function, self._error = None, broken  # nobody touches the tensors any more
        self._over.set()
        return broken


class Ring:
    """This worker's place in a ring, with a thread that does one thing after the other.

    All workers must begin the same in the same order.

    Args:
        rank: this worker's number in the ring.
        size: how many workers there are, from 2 on.
        to_next: a connection to worker ``rank + 1``.
        from_previous: one from worker ``rank - 1``. Both are this object's from now on.
    """

    def __init__(
        self, rank: int, size: int, to_next: socket.socket, from_previous: socket.socket
    ) -> None:
        self._rank, self._size = rank, size
        self._next, self._previous = to_next, from_previous
        for connection in (to_next, from_previous):
            connection.setblocking(False)
        to_next.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._used = 0.0
        self._mark = 1
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._works: SimpleQueue[RingWork | None] = SimpleQueue()
        # A daemon: the process may end while it waits for a worker that is gone.
        self._thread = threading.Thread(target=self._run, name="easgd-ring", daemon=True)
        self._thread.start()

    def sum_(self, buckets: Sequence[Tensor]) -> RingWork:
        """Begin to replace flat tensors by their sums over the workers, in turn.

        Args:
            buckets: in host memory; of the same sizes and precisions on all workers. Nobody else
                may touch them until it is over.
        """
        return self._begin(partial(self._sum, buckets))

    def gather(self, mine: Tensor, everybody: Tensor) -> RingWork:
        """Begin to bring every worker a flat tensor of each.

        Args:
            mine: this worker's, in host memory; of the same size and precision on all of them.
            everybody: where they arrive, of shape (workers, size of ``mine``).
        """
        everybody[self._rank] = mine
        return self._begin(partial(self._pass_around, everybody.unbind(), self._rank))

    def processor_seconds(self) -> float:
        """What its thread has had of a processor so far."""
        return self._used

    def close(self) -> None:
        """Leave the ring; what is under way ends with an error."""
        self._works.put(None)
        for connection in (self._next, self._previous):
            with suppress(OSError):  # the other end has left
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_END_SECONDS)

    def _begin(self, function: Callable[[], None]) -> RingWork:
        work = RingWork(function)
        self._works.put(work)
        return work

    def _run(self) -> None:
        broken: Exception | None = None  # what follows an error would be out of step
        with self._next, self._previous:
            while (work := self._works.get()) is not None:
                broken = work.run(broken)
                self._used = time.thread_time()
                del work

    def _sum(self, buckets: Iterable[Tensor]) -> None:
        for bucket in buckets:
            bounds = [bucket.numel() * i // self._size for i in range(self._size + 1)]
            chunks = [bucket[a:b] for a, b in pairwise(bounds)]
            self._pass_around(chunks, self._rank, add=True)
            self._pass_around(chunks, self._rank + 1)

    def _pass_around(self, chunks: Sequence[Tensor], first: int, *, add: bool = False) -> None:
        """Send on what has arrived, one chunk after the other, beginning with the ``first``."""
        for at in range(first, first - self._size + 1, -1):
            self._pass_on(chunks[at % self._size], chunks[(at - 1) % self._size], add=add)

    def _pass_on(self, leaving: Tensor, arriving: Tensor, *, add: bool) -> None:
        """Send one chunk while another arrives, to be added to what is there or to replace it."""
        left = _bytes_of(leaving)
        for piece in torch.split(arriving, _PIECE_BYTES // arriving.itemsize):
            target = self._scratch_like(piece) if add else piece
            missing = _bytes_of(target)
            while missing:
                left = self._send(left)
                self._wait(len(missing), bool(left))
                missing = self._receive(missing)
            if add:
                piece.add_(target)
        while left := self._send(left):
            self._wait(0, True)

    def _scratch_like(self, piece: Tensor) -> Tensor:
        if self._scratch.numel() < piece.nbytes:
            self._scratch = torch.empty(piece.nbytes, dtype=torch.uint8)
        return self._scratch[: piece.nbytes].view(piece.dtype)

    def _send(self, left: memoryview) -> memoryview:
        """Give the kernel what it takes of it; the rest is left."""
        if not left:
            return left
        try:
            return left[self._next.send(left) :]
        except BlockingIOError:
            return left

    def _receive(self, missing: memoryview) -> memoryview:
        """Take what has arrived; what is still missing."""
        try:
            count = self._previous.recv_into(missing)
        except BlockingIOError:
            return missing
        if not count:
            raise ConnectionError("The worker before this one in the ring has left.")
        return missing[count:]

    def _wait(self, wanted: int, sending: bool) -> None:
        """Wait until ``wanted`` bytes have arrived or, if so wanted, more can be sent."""
        poll = select.poll()
        if wanted:
            if wanted != self._mark:
                self._previous.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
                self._mark = wanted
            poll.register(self._previous, select.POLLIN)
        if sending:
            poll.register(self._next, select.POLLOUT)
        poll.poll(_PATIENCE_MILLISECONDS)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data
