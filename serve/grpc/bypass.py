"""The two ends of `serve.bypass` over gRPC: around a handler of Ray Serve's proxy, and around a streaming method of a front.

Ray forwards each message whole and unread, together with the state of the call (code, trailers). So the beginning and the end of a
response travel as messages of their own, which are not sent to the client. They start with a zero byte, which no protobuf message
does, as there is no field 0.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

import serve.bypass
from cluster.bypass import ChunksLost, IncomingStream
from serve.bypass import HEADER, FrontEndpoint, ProxyEndpoint
from serve.errors import FrontLost
from serve.grpc.errors import CallContext, refuse

Stream = Callable[[Any, Any], AsyncGenerator[bytes, None]]
SIGNAL = re.compile(rb"\0(begin|end) (\d+)")


@dataclass(frozen=True)
class BypassSignal:
    """Sent by a front to the proxy in place of a message."""

    word: str
    """begin or end."""
    number: int
    """begin: the response's number (`cluster.bypass.new_answer_number`); end: how many chunks there were."""

    def SerializeToString(self) -> bytes:  # Ray Serve calls it, as on any message
        return b"\0%s %d" % (self.word.encode(), self.number)

    @classmethod
    def parse(cls, raw: bytes) -> "BypassSignal | None":
        """None if ``raw`` is a message."""
        found = SIGNAL.fullmatch(raw)
        return None if found is None else cls(found[1].decode(), int(found[2]))


class ContextWithHeader:
    """A call's context whose metadata has the proxy's `HEADER`, in place of whatever the client sent under that name.

    It can still be asked for the peer when the call is over: Ray Serve logs the peer of every stream when its generator ends, which for
    a cancelled stream is after the call. grpcio (seen in 1.84 and 1.85) has released the call by then, and asking it ends the process.
    """

    def __init__(self, context: Any, header: str | None) -> None:
        self._context = context
        self._peer: str = context.peer()
        self._metadata = [(key, value) for key, value in context.invocation_metadata() or () if key != HEADER]
        if header is not None:
            self._metadata.append((HEADER, header))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._metadata

    def peer(self) -> str:
        return self._peer


def receive_past_ray(handler: grpc.RpcMethodHandler, endpoint: ProxyEndpoint) -> grpc.RpcMethodHandler:
    """In the proxy: the handler, whose streams also send what comes over the socket."""
    if handler.request_streaming or not handler.response_streaming:
        return handler
    return handler._replace(unary_stream=_receiving(handler.unary_stream, endpoint))


def _receiving(stream: Stream, endpoint: ProxyEndpoint) -> Stream:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        incoming = endpoint.open()
        messages = stream(request, ContextWithHeader(context, None if incoming is None else endpoint.header_value(incoming)))
        if incoming is None:
            async for message in messages:
                yield message
            return
        waiting_for_end: asyncio.Task[bool] | None = None
        try:
            async for message in messages:
                if (begin := BypassSignal.parse(message)) is not None:
                    incoming.begin(begin.number)
                    break
                yield message
            else:
                return
            waiting_for_end = asyncio.create_task(_wait_for_end(messages, incoming))
            num_taken = 0
            while chunks := await incoming.take(num_taken, serve.bypass.LATE_S):
                for chunk in chunks:
                    num_taken += 1
                    yield chunk
            has_end = await waiting_for_end
            await _exhaust(messages)  # a proxy that shuts down waits for streams that are open with Ray, so not before
            if not has_end and context.code() in (None, grpc.StatusCode.OK):
                raise ChunksLost(f"{num_taken} chunks and no end came")
        except ChunksLost as lost:
            endpoint.pause(str(lost))
            await _exhaust(messages)  # it sets the status OK, which is replaced below
            refuse(context, FrontLost(), "")
        finally:
            incoming.close()
            if waiting_for_end is not None:
                if not waiting_for_end.done():  # this is how Ray learns to cancel the call behind it
                    waiting_for_end.cancel()
                    await asyncio.wait([waiting_for_end])
                if not waiting_for_end.cancelled():
                    waiting_for_end.exception()  # asyncio reports one that nobody has asked for, and a client that has gone does not

    return unary_stream


async def _wait_for_end(messages: AsyncGenerator[bytes, None], incoming: IncomingStream) -> bool:
    """Passes the end to the stream when it comes through Ray. False if none comes, as when the front is lost."""
    try:
        async for message in messages:
            if (signal := BypassSignal.parse(message)) is None or signal.word != "end":
                raise _unexpected_message()
            incoming.end_after(signal.number)
            return True
        return False
    finally:
        incoming.end_here()


async def _exhaust(messages: AsyncGenerator[bytes, None]) -> None:
    """Reads to the end; no message may come any more."""
    async for _ in messages:
        raise _unexpected_message()


def _unexpected_message() -> RuntimeError:
    return RuntimeError("a message came through Ray although this response uses the bypass")


async def send_past_ray(
    responses: AsyncGenerator[Message, None], context: CallContext, bypass: FrontEndpoint
) -> AsyncGenerator[Message | BypassSignal, None]:
    """In the front: yields what goes through Ray, and sends the messages to the proxy directly where it can be reached."""
    stream = bypass.stream_for([value for key, value in context.invocation_metadata() or () if key == HEADER])
    async with aclosing(responses):
        if stream is None:
            async for response in responses:
                yield response
            return
        yield BypassSignal("begin", stream.answer)
        num_chunks = 0
        async for response in responses:
            try:
                stream.put(response.SerializeToString())
            except ChunksLost:
                refuse(context, FrontLost(), "")  # sets the status, in case the proxy still lives
                raise
            num_chunks += 1
        yield BypassSignal("end", num_chunks)
