# Generated from `_async/transport.py` by client/unasync.py. Do not edit.
"""The channel to the server, and how calls are made on it: API key, timeout, retries."""

import time
from collections.abc import Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from .._generated import admin_pb2_grpc, messages_pb2, service_pb2, service_pb2_grpc
from ..assembly import Event
from ..endpoint import Access, Certificates
from ..errors import CallFailed
from ..retry import Attempts, RetryPolicy
from ..rpc_errors import from_event, from_rpc_error

Response = TypeVar("Response", bound=Message)
StreamRequest = service_pb2.ChatStreamRequest | service_pb2.GenerateStreamRequest
KEY = "idempotency-key"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),  # notices a server that vanished during a long answer
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),  # we retry ourselves: gRPC's retries ignore RetryInfo
)


class Transport:
    def __init__(self, access: Access, *, certificates: Certificates, timeout_s: float | None, retry: RetryPolicy) -> None:
        self._access, self._timeout_s, self._retry = access, timeout_s, retry
        self._channel = _open_channel(access, certificates)
        stubs = (service_pb2_grpc.MantaServiceStub(self._channel), admin_pb2_grpc.AdminServiceStub(self._channel))
        self._methods = {name: method for stub in stubs for name, method in vars(stub).items()}

    def call(self, method: str, request: Message, response: type[Response], *, timeout_s: float | None, key: str = "") -> Response:
        """Make a unary call. Every attempt has the same idempotency ``key``, if there is one.

        Raises:
            CallFailed: the last attempt failed.
        """
        attempts = self.attempts(timeout_s)
        while True:
            try:
                answer = self.start(method, request, attempts, key)
                assert isinstance(answer, response)
                return answer
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(from_rpc_error(error))
            time.sleep(pause_s)

    def attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    def start(self, method: str, request: Message, attempts: Attempts, key: str):  # type: ignore[no-untyped-def]
        """Start one attempt."""
        metadata = (*self._access.metadata, (KEY, key)) if key else self._access.metadata
        return self._methods[method](request, timeout=attempts.remaining_s(), metadata=metadata)

    def close(self) -> None:
        self._channel.close()

    def __repr__(self) -> str:
        return repr(self._access)


class StreamingCall:
    """A streaming call with retries: until the first event it is repeated, after that it is resumed to get the rest."""

    def __init__(self, transport: Transport, method: str, request: StreamRequest, *, timeout_s: float | None, key: str) -> None:
        self._transport, self._method, self._request, self._key = transport, method, request, key
        self._attempts = transport.attempts(timeout_s)

    def open(self) -> "EventStream":
        """Make the call, and wait for its first event.

        Raises:
            CallFailed: the last attempt failed.
        """
        while True:
            stream = EventStream(self._transport.start(self._method, self._request, self._attempts, self._key))
            try:
                stream.begin()
                return stream
            except CallFailed as failure:
                stream.cancel()
                pause_s = self._attempts.pause_s(failure)
            except BaseException:
                stream.cancel()
                raise
            time.sleep(pause_s)

    def progressed(self) -> None:
        """An event has arrived; see `Attempts.progressed`."""
        self._attempts.progressed()

    def reopen(self, failure: CallFailed, so_far: Sequence[messages_pb2.SoFar]) -> "EventStream":
        """Ask for what comes after ``so_far``.

        Raises:
            CallFailed: ``failure``, if there is no further attempt; or the error of the last one.
        """
        time.sleep(self._attempts.pause_s(failure))
        del self._request.so_far[:]
        self._request.so_far.extend(so_far)
        return self.open()


class EventStream:
    """The events of one streaming call."""

    def __init__(self, call) -> None:  # type: ignore[no-untyped-def]
        self._call = call
        self._events = iter(call)
        self._first: Event | None = None
        self._cancelled = False

    def begin(self) -> None:
        """Wait for the first event.

        Raises:
            CallFailed: the call failed, or its first event is an error.
        """
        self._first = self._receive()
        if self._first is not None and self._first.WhichOneof("event") == "error":
            raise from_event(self._first.error, self._first.id)

    def next(self) -> Event | None:
        """The next event; None after the last one, or if the call was cancelled here.

        Raises:
            CallFailed: the call failed.
        """
        if self._first is not None:
            event, self._first = self._first, None
            return event
        return self._receive()

    def cancel(self) -> None:
        """Cancel the call in the server. Does nothing if it has ended."""
        self._cancelled = True
        self._call.cancel()

    def _receive(self) -> Event | None:
        try:
            event: Event = next(self._events)
            return event
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled:
                return None
            raise from_rpc_error(error) from None
        except grpc.FutureCancelledError:  # the reading task was cancelled, or another task cancelled the call
            if self._cancelled:
                return None
            raise


def _open_channel(access: Access, certificates: Certificates) -> grpc.Channel:
    if access.endpoint.secure:
        credentials = grpc.ssl_channel_credentials(certificates.roots, certificates.key, certificates.chain)
        return grpc.secure_channel(access.endpoint.target, credentials, options=CHANNEL_OPTIONS)
    return grpc.insecure_channel(access.endpoint.target, options=CHANNEL_OPTIONS)
