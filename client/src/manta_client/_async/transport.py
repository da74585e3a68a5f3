"""One channel to the server, and how calls are made on it: key, timeout, retries."""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from .._generated import admin_pb2_grpc, messages_pb2, service_pb2, service_pb2_grpc
from ..assembly import Event
from ..endpoint import Access, Certificates
from ..errors import CallFailed
from ..failures import from_event, from_rpc_error
from ..retry import Attempts, RetryPolicy

Response = TypeVar("Response", bound=Message)
StreamRequest = service_pb2.ChatStreamRequest | service_pb2.GenerateStreamRequest
KEY = "idempotency-key"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),  # notices a server that vanished without a word during a long answer
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),  # retries are ours: gRPC's know nothing of RetryInfo
)


class AsyncTransport:
    def __init__(self, access: Access, *, certificates: Certificates, timeout_s: float | None, retry: RetryPolicy) -> None:
        self._access, self._timeout_s, self._retry = access, timeout_s, retry
        self._channel = _open_channel(access, certificates)
        stubs = (service_pb2_grpc.MantaServiceStub(self._channel), admin_pb2_grpc.AdminServiceStub(self._channel))
        self._methods = {name: method for stub in stubs for name, method in vars(stub).items()}

    async def call(self, method: str, request: Message, response: type[Response], *, timeout_s: float | None, key: str = "") -> Response:
        """Make a call that has one answer. Every try has the same idempotency ``key``, where there is one.

        Raises:
            CallFailed: it failed, also after the retries.
        """
        attempts = self.attempts(timeout_s)
        while True:
            try:
                answer = await self.start(method, request, attempts, key)
                assert isinstance(answer, response)
                return answer
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(from_rpc_error(error))
            await asyncio.sleep(pause_s)

    def attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    def start(self, method: str, request: Message, attempts: Attempts, key: str):  # type: ignore[no-untyped-def]
        """Begin one try."""
        metadata = (*self._access.metadata, (KEY, key)) if key else self._access.metadata
        return self._methods[method](request, timeout=attempts.remaining_s(), metadata=metadata)

    async def close(self) -> None:
        await self._channel.close()

    def __repr__(self) -> str:
        return repr(self._access)


class AsyncAsked:
    """A streaming call that may be made more than once: until its first event by way of retry, after it to get the rest."""

    def __init__(self, transport: AsyncTransport, method: str, request: StreamRequest, *, timeout_s: float | None, key: str) -> None:
        self._transport, self._method, self._request, self._key = transport, method, request, key
        self._attempts = transport.attempts(timeout_s)

    async def open(self) -> "AsyncEventStream":
        """
        Raises:
            CallFailed: it failed, also after the retries.
        """
        while True:
            stream = AsyncEventStream(self._transport.start(self._method, self._request, self._attempts, self._key))
            try:
                await stream.begin()
                return stream
            except CallFailed as failure:
                stream.cancel()
                pause_s = self._attempts.pause_s(failure)
            except BaseException:
                stream.cancel()
                raise
            await asyncio.sleep(pause_s)

    def progressed(self) -> None:
        """Something came."""
        self._attempts.progressed()

    async def reopen(self, failure: CallFailed, so_far: Sequence[messages_pb2.SoFar]) -> "AsyncEventStream":
        """Ask for what comes after ``so_far``.

        Raises:
            CallFailed: the failure, if the rest cannot be had.
        """
        await asyncio.sleep(self._attempts.pause_s(failure))
        del self._request.so_far[:]
        self._request.so_far.extend(so_far)
        return await self.open()


class AsyncEventStream:
    """The events of one streaming call."""

    def __init__(self, call) -> None:  # type: ignore[no-untyped-def]
        self._call = call
        self._events = aiter(call)
        self._first: Event | None = None
        self._cancelled = False

    async def begin(self) -> None:
        """Wait for the first event.

        Raises:
            CallFailed: the call failed, or its first event is an error.
        """
        self._first = await self._receive()
        if self._first is not None and self._first.WhichOneof("event") == "error":
            raise from_event(self._first.error, self._first.id)

    async def next(self) -> Event | None:
        """The next event; None after the last, and once the call was cancelled here.

        Raises:
            CallFailed: the call failed.
        """
        if self._first is not None:
            event, self._first = self._first, None
            return event
        return await self._receive()

    def cancel(self) -> None:
        """Tell the server that nobody reads on. Nothing happens if the call has ended."""
        self._cancelled = True
        self._call.cancel()

    async def _receive(self) -> Event | None:
        try:
            event: Event = await anext(self._events)
            return event
        except StopAsyncIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled:
                return None
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:  # of the reading task, or of the call by another task
            if self._cancelled:
                return None
            raise


def _open_channel(access: Access, certificates: Certificates) -> grpc.aio.Channel:
    if access.endpoint.secure:
        credentials = grpc.ssl_channel_credentials(certificates.roots, certificates.key, certificates.chain)
        return grpc.aio.secure_channel(access.endpoint.target, credentials, options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(access.endpoint.target, options=CHANNEL_OPTIONS)
