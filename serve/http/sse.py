"""Place 14 of a streamed request over HTTP: text events become server-sent events."""

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.bypass import BypassStream
from serve.errors import ErrorBody, describe
from serve.hold_header import hold_headers
from serve.http.bypass import BYPASS_STREAM, PASSED
from serve.http.disconnect import cancel_on_disconnect
from serve.request import TextEvent, Usage

DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""The second keeps nginx from buffering the stream."""


class StreamFormat(Protocol):
    """How one API writes a stream, as JSON objects."""

    def start(self) -> Iterable[dict[str, Any]]:
        """Sent before the first event."""
        ...

    def event(self, event: TextEvent) -> Iterable[dict[str, Any]]:
        """The objects for an event; none if it has nothing that this API reports."""
        ...

    def end(self, usage: Usage) -> Iterable[dict[str, Any]]:
        """Sent after the last event."""
        ...

    def error(self, error: ErrorBody) -> Iterable[dict[str, Any]]:
        """Sent when the stream fails, in place of the remaining events."""
        ...


class EventStreamResponse(Response):
    """Sends a stream. Its source is closed when the stream ends or fails, or the client disconnects."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: TextEvent,
        rest: AsyncGenerator[TextEvent, None],
        stream_format: StreamFormat,
        headers: dict[str, str] | None = None,
        *,
        include_timing: bool = False,
    ) -> None:
        super().__init__(headers=HEADERS | (headers or {}))
        del self.headers["content-length"]
        self._first, self._rest, self._format, self._include_timing = first, rest, stream_format, include_timing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(receive, self._send(send, scope.get(BYPASS_STREAM)))
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send, bypass: BypassStream | None) -> None:
        """``bypass``: takes the chunks of the body past Ray; None: they are sent with ``send``."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start if bypass is None else start | {PASSED: bypass.answer})
        num_chunks = 0
        written = event_bytes(self._first, self._rest, self._format, include_timing=self._include_timing)
        async with contextlib.aclosing(written) as chunks:
            async for chunk in chunks:
                num_chunks += 1
                if bypass is None:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                else:
                    bypass.put(chunk)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(end if bypass is None else end | {PASSED: num_chunks})


async def open_stream(
    receive: Receive,
    events: AsyncGenerator[TextEvent, None],
    stream_format: StreamFormat,
    headers: dict[str, str] | None = None,
    *,
    include_timing: bool = False,
) -> EventStreamResponse:
    """Waits for the first event, so that a refusal still gets its own HTTP status, then streams.

    Raises:
        ClientDisconnected, ServeError, EngineError: before the first event; nothing has been sent then.
    """
    try:
        first = await cancel_on_disconnect(receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    headers = (headers or {}) | hold_headers(first.held_s)
    return EventStreamResponse(first, events, stream_format, headers, include_timing=include_timing)


async def event_bytes(
    first: TextEvent, rest: AsyncGenerator[TextEvent, None], stream_format: StreamFormat, *, include_timing: bool = False
) -> AsyncGenerator[bytes, None]:
    """The body of the response, in chunks. A failure is written as an event, and the stream then has no [DONE].

    ``include_timing``: write the timing before [DONE] as a comment, which every reader of server-sent events skips.
    """
    timing = b""
    usage, start = None, b"".join(map(encode_event, stream_format.start()))
    try:
        event: TextEvent | None = first
        while event is not None:
            usage, written = event.usage or usage, start + b"".join(map(encode_event, stream_format.event(event)))
            if include_timing and event.timing is not None:
                timing = f": server-timing {event.timing.server_timing()}\n\n".encode()
            if written:
                yield written
                start = b""
            event = await anext(rest, None)
        if usage is None:
            raise RuntimeError("the service ended a stream without its last event")
    except Exception as error:
        yield start + b"".join(map(encode_event, stream_format.error(describe(error))))
        return
    yield b"".join(map(encode_event, stream_format.end(usage))) + timing + DONE


def encode_event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event. If the object has a ``type``, it is also the event's name."""
    name = f"event: {chunk['type']}\n".encode() if "type" in chunk else b""
    return name + b"data: " + msgspec.json.encode(chunk) + b"\n\n"  # JSON contains no raw line ends, so one data line is enough
