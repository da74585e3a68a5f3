"""Streams past Ray over gRPC: both ends of `serve.bypass`, around a handler of Ray Serve's proxy and around a front's method.

Ray hands on messages whole and unread, with the state of the call (code, trailers) beside each. So a beginning and an end travel as
messages of their own, which no client is given: they start with a zero byte, and no message of protobuf does, as it has no field 0.
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
from cluster.bypass import IncomingStream, PiecesLost
from serve.bypass import HEADER, Passages, Ways
from serve.errors import FrontLost
from serve.grpc.errors import CallContext, refuse

Stream = Callable[[Any, Any], AsyncGenerator[bytes, None]]
SIGNAL = re.compile(rb"\0(begin|end) (\d+)")


@dataclass(frozen=True)
class Signal:
    """From a front to the proxy, in place of a message."""

    word: str
    """begin or end."""
    number: int
    """Of the answer (`cluster.bypass.new_answer_number`), or how many pieces there were."""

    def SerializeToString(self) -> bytes:  # Ray Serve asks a message for it
        return b"\0%s %d" % (self.word.encode(), self.number)

    @classmethod
    def of(cls, raw: bytes) -> "Signal | None":
        """None for a message."""
        told = SIGNAL.fullmatch(raw)
        return None if told is None else cls(told[1].decode(), int(told[2]))


class Introduced:
    """A call's context, with what the proxy tells the front among the client's metadata, and nothing of that name that the client sent."""

    def __init__(self, context: Any, told: str | None) -> None:
        self._context = context
        self._metadata = [(key, value) for key, value in context.invocation_metadata() or () if key != HEADER]
        if told is not None:
            self._metadata.append((HEADER, told))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._metadata


def past_ray(handler: grpc.RpcMethodHandler, passages: Passages) -> grpc.RpcMethodHandler:
    """In the proxy: the handler, whose streams hand on what comes by the socket as if it had come by Ray."""
    if handler.request_streaming or not handler.response_streaming:
        return handler
    return handler._replace(unary_stream=_handing_on(handler.unary_stream, passages))


def _handing_on(stream: Stream, passages: Passages) -> Stream:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        passage = passages.open()
        messages = stream(request, Introduced(context, None if passage is None else passages.told(passage)))
        if passage is None:
            async for message in messages:
                yield message
            return
        following: asyncio.Task[bool] | None = None
        try:
            async for message in messages:
                if (begun := Signal.of(message)) is not None:
                    passage.begin(begun.number)
                    break
                yield message
            else:
                return
            following = asyncio.create_task(_until_end(messages, passage))
            num_taken = 0
            while pieces := await passage.take(num_taken, serve.bypass.LATE_S):
                for piece in pieces:
                    num_taken += 1
                    yield piece
            has_end = await following
            await _exhaust(messages)  # a proxy that is to go waits for streams that are open with Ray, so not before
            if not has_end and context.code() in (None, grpc.StatusCode.OK):
                raise PiecesLost(f"{num_taken} pieces and no end came")
        except PiecesLost as lost:
            passages.pause(str(lost))
            await _exhaust(messages)  # it says that all is well
            refuse(context, FrontLost(), "")
        finally:
            passage.close()
            if following is not None and not following.done():  # so Ray cancels the call behind it
                following.cancel()
                await asyncio.wait([following])

    return unary_stream


async def _until_end(messages: AsyncGenerator[bytes, None], passage: IncomingStream) -> bool:
    """Tells the passage of the end when it comes by Ray; False if none does, as none comes of a front that is lost."""
    try:
        async for message in messages:
            if (told := Signal.of(message)) is None or told.word != "end":
                raise _out_of_turn()
            passage.end_after(told.number)
            return True
        return False
    finally:
        passage.end_here()


async def _exhaust(messages: AsyncGenerator[bytes, None]) -> None:
    """Nothing comes of them any more but their end."""
    async for _ in messages:
        raise _out_of_turn()


def _out_of_turn() -> RuntimeError:
    return RuntimeError("a message came by Ray where those of this answer pass it")


async def passed(responses: AsyncGenerator[Message, None], context: CallContext, ways: Ways) -> AsyncGenerator[Message | Signal, None]:
    """In the front: what Ray is given of a stream, and the rest to the proxy where there is a way."""
    way = ways.as_told([value for key, value in context.invocation_metadata() or () if key == HEADER])
    async with aclosing(responses):
        if way is None:
            async for response in responses:
                yield response
            return
        yield Signal("begin", way.answer)
        num_pieces = 0
        async for response in responses:
            try:
                way.put(response.SerializeToString())
            except PiecesLost:
                refuse(context, FrontLost(), "")  # the status, should the proxy still live
                raise
            num_pieces += 1
        yield Signal("end", num_pieces)
