"""One channel to the server, and how calls are made on it: key, timeout, retries."""

import asyncio
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from .._generated import service_pb2_grpc
from ..assembly import Event
from ..endpoint import Access, Certificates
from ..errors import CallFailed
from ..failures import from_event, from_rpc_error
from ..retry import Attempts, RetryPolicy

Response = TypeVar("Response", bound=Message)
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
        self._stub = service_pb2_grpc.MantaServiceStub(self._channel)

    async def call(self, method: str, request: Message, response: type[Response], *, timeout_s: float | None) -> Response:
        """Make a call that has one answer.

        Raises:
            CallFailed: it failed, also after the retries.
        """
        attempts = self._attempts(timeout_s)
        while True:
            try:
                answer = await self._start(method, request, attempts)
                assert isinstance(answer, response)
                return answer
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(from_rpc_error(error))
            await asyncio.sleep(pause_s)

    async def open_stream(self, method: str, request: Message, *, timeout_s: float | None) -> "AsyncEventStream":
        """Begin a call that answers with a stream. Until its first event it is retried; from then on it never is.

        Raises:
            CallFailed: it failed, also after the retries.
        """
        attempts = self._attempts(timeout_s)
        while True:
            stream = AsyncEventStream(self._start(method, request, attempts))
            try:
                await stream.begin()
                return stream
            except CallFailed as failure:
                stream.cancel()
                pause_s = attempts.pause_s(failure)
            except BaseException:
                stream.cancel()
                raise
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        await self._channel.close()

    def __repr__(self) -> str:
        return repr(self._access)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_s if timeout_s is None else timeout_s)

    def _start(self, method: str, request: Message, attempts: Attempts):  # type: ignore[no-untyped-def]
        return getattr(self._stub, method)(request, timeout=attempts.remaining_s(), metadata=self._access.metadata)


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
