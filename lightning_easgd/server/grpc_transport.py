"""Messages over gRPC: one method for all, raw bytes both ways, and TLS that shows both sides' keys.

The method streams frames in both directions, so no limit on the size of a message bites. It is
registered by its name, with bytes as its messages. Generated code would only wrap those bytes, and
would tie the package to a version of protobuf.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from lightning_easgd.server.answers import LostError
from lightning_easgd.server.certificates import (
    SERVER,
    SERVER_NAME,
    Certificates,
    ShutOut,
    require_protected,
)
from lightning_easgd.server.frames import FRAME_BYTES
from lightning_easgd.server.handler import Handler
from lightning_easgd.server.refusal import Refused
from lightning_easgd.server.replication import bring
from lightning_easgd.server.standing import NotPrimary

try:
    import grpc
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "A center behind a server needs gRPC: pip install -e '.[async]'."
    ) from error

LONGEST_CALL = 600.0
"""Seconds; a worker must say how long its call may take, and a longer one is refused."""

_SERVICE, _ASK, _FOLLOW = "lightning_easgd.Center", "ask", "follow"
AT_ONCE = 32
"""Calls of workers that are answered at once; so many differences lie in memory at most."""
_OPTIONS = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


class GrpcServer:
    """Serves a center at an address; begins at once.

    Args:
        handler: answers.
        address: host and port; port 0 takes a free one.
        certificates: of the server; needed where others than this machine reach the address.
        shut_out: names on certificates that are not let in although the authority signed them.
        insecure: whether to do without there. Then whoever reaches the address can read and change
            the center.

    Attributes:
        port: on which it listens.

    Raises:
        ValueError: the address needs certificates, or is none.
        OSError: the address is taken, or not of this machine.
    """

    def __init__(
        self,
        handler: Handler,
        address: str = "127.0.0.1:0",
        *,
        certificates: Certificates | None = None,
        shut_out: ShutOut | None = None,
        insecure: bool = False,
    ) -> None:
        require_protected(address, certificates, insecure)
        self._handler = handler
        self._shut_out = shut_out
        workers = handler.server.settings.limits.most_workers
        # Workers may all wait until the standby has their differences: it needs a thread, too.
        self._threads = ThreadPoolExecutor(workers + 8, "center-server")
        self._at_once = threading.BoundedSemaphore(AT_ONCE)
        self._server = grpc.server(
            self._threads,
            options=[*_OPTIONS, ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=4 * workers,
        )
        methods = {
            name: grpc.stream_stream_rpc_method_handler(method)
            for name, method in ((_ASK, self._ask), (_FOLLOW, self._follow))
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE, methods)
        self._server.add_generic_rpc_handlers((generic,))
        self.port = self._listen(address, certificates)
        self._server.start()

    def close(self, grace: float = 5.0) -> None:
        """Answer what has come, and end.

        Args:
            grace: seconds that this may take.
        """
        self._server.stop(grace).wait()
        self._threads.shutdown()

    def _listen(self, address: str, certificates: Certificates | None) -> int:
        try:
            if certificates:
                return int(self._server.add_secure_port(address, _for_server(certificates)))
            return int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            self._threads.shutdown()
            raise OSError(
                f"A server cannot listen at {address} ({error}). Is another one there? Take another"
                " port, or 0 for any."
            ) from error

    def _ask(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        left = self._let_in(context)
        if not self._at_once.acquire(timeout=left):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Too many ask at once.")
        try:
            yield from self._handler.answer(frames, _sender(context), _site(context))
        except NotPrimary as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            self._at_once.release()

    def _follow(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._let_in(context)
        if (names := _names(context)) and SERVER not in names:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{names} is no server.")
        try:
            yield from bring(self._handler, frames)
        except (NotPrimary, Refused) as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    def _let_in(self, context: grpc.ServicerContext) -> float:
        """The seconds that a call may take, of one that may come in."""
        left = context.time_remaining()
        if left is None or left > LONGEST_CALL:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"A call must say how long it may take, and that at most {LONGEST_CALL:g} s.",
            )
        for name in _names(context):
            if self._shut_out is not None and name in self._shut_out:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, f"'{name}' was shut out.")
        return float(left)


class GrpcTransport:
    """Carries messages to the first of several servers that answers.

    Args:
        addresses: of a server and those that may take its place, each with host and port.
        certificates: of the worker; needed where an address is not of this machine.
        insecure: whether to do without there.
        follow: whether to ask as a standby does.
        said: of a server that is lost, in errors.

    Raises:
        ValueError: there is no address, or one needs certificates.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        *,
        certificates: Certificates | None = None,
        insecure: bool = False,
        follow: bool = False,
        said: str = "",
    ) -> None:
        self._said = said
        self._path = f"/{_SERVICE}/{_FOLLOW if follow else _ASK}"
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self.addresses:
            raise ValueError("addresses=[] is not allowed. Allowed: at least one, as 'host:5700'.")
        for address in self.addresses:
            require_protected(address, certificates, insecure)
        self._certificates = certificates
        self._at = 0
        self._channel: grpc.Channel | None = None

    def call(self, frames: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        """The frames of the answer.

        Raises:
            LostError: there is none; the next call goes to the next address.
        """
        call: Any = None
        try:
            ask = self._open().stream_stream(self._path)
            call = ask(iter(frames), timeout=min(deadline, LONGEST_CALL))
            yield from call
        except grpc.RpcError as error:
            lost = self.addresses[self._at]
            self.close()
            self._at = (self._at + 1) % len(self.addresses)
            raise LostError(f"{lost}{self._said}: {_told(error)}") from error
        finally:
            if call is not None:
                call.cancel()

    def close(self) -> None:
        """Close the connection; a call opens it again."""
        channel, self._channel = self._channel, None  # another thread may close it, too
        if channel is not None:
            channel.close()

    def _open(self) -> grpc.Channel:
        if self._channel is None:
            address = self.addresses[self._at]
            if self._certificates:
                name = ("grpc.ssl_target_name_override", SERVER_NAME)
                self._channel = grpc.secure_channel(
                    address, _for_worker(self._certificates), [*_OPTIONS, name]
                )
            else:
                self._channel = grpc.insecure_channel(address, _OPTIONS)
        return self._channel


def _for_server(certificates: Certificates) -> grpc.ServerCredentials:
    """A worker without a certificate that the authority signed is not let in."""
    authority, certificate, key = certificates.contents()
    return grpc.ssl_server_credentials([(key, certificate)], authority, True)


def _for_worker(certificates: Certificates) -> grpc.ChannelCredentials:
    """A server without a certificate that the authority signed is not spoken to."""
    authority, certificate, key = certificates.contents()
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _names(context: grpc.ServicerContext) -> list[str]:
    """On the certificate of who speaks; none without one."""
    names = context.auth_context().get("x509_common_name", [])
    return [name.decode(errors="replace") for name in names]


def _site(context: grpc.ServicerContext) -> str:
    """Whose certificate it is, in visible characters; empty without one."""
    return "+".join(quote(name, safe="") for name in _names(context))


def _sender(context: grpc.ServicerContext) -> str:
    """Who speaks, as its certificate says, and from where."""
    return " ".join([*_names(context), context.peer()])


def _told(error: grpc.RpcError) -> str:
    code = error.code() if isinstance(error, grpc.Call) else None
    return f"{code.name.lower()}, {error.details()}" if code else repr(error)
