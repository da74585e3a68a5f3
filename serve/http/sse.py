"""Step 14 of a request, over HTTP: text events become server-sent events."""

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.bypass import Way
from serve.errors import ErrorBody, describe
from serve.hold_header import held_headers
from serve.http.bypass import PASSED, WAY
from serve.http.disconnect import unless_gone
from serve.request import TextEvent, Usage

DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""The second keeps nginx from collecting the stream before it passes it on."""


class Chunks(Protocol):
    """How one API writes its stream."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """What comes before the first event."""
        ...

    def of(self, event: TextEvent) -> Iterable[dict[str, Any]]:
        """The chunks for an event: none where there is nothing to say of it."""
        ...

    def closing(self, usage: Usage) -> Iterable[dict[str, Any]]:
        """What comes after the last event."""
        ...

    def failing(self, error: ErrorBody) -> Iterable[dict[str, Any]]:
        """What comes where no more events do."""
        ...


class EventStream(Response):
    """Sends a stream; the source is closed when it ends, fails, or the client leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: TextEvent,
        rest: AsyncGenerator[TextEvent, None],
        chunks: Chunks,
        headers: dict[str, str] | None = None,
        *,
        tell_ledger: bool = False,
    ) -> None:
        super().__init__(headers=HEADERS | (headers or {}))
        del self.headers["content-length"]
        self._first, self._rest, self._chunks, self._tell_ledger = first, rest, chunks, tell_ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send, scope.get(WAY)))
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send, way: Way | None) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start if way is None else start | {PASSED: way.answer})
        num_frames = 0
        async with contextlib.aclosing(frames(self._first, self._rest, self._chunks, tell_ledger=self._tell_ledger)) as written:
            async for frame in written:
                num_frames += 1
                if way is None:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                else:
                    way.put(frame)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(end if way is None else end | {PASSED: num_frames})


async def open_stream(
    receive: Receive,
    events: AsyncGenerator[TextEvent, None],
    chunks: Chunks,
    headers: dict[str, str] | None = None,
    *,
    tell_ledger: bool = False,
) -> EventStream:
    """Wait for the first event, so that a refusal still has a status of its own, then stream.

    Raises:
        ClientGone, ServeError, EngineError: before the first event; nothing was sent then.
    """
    try:
        first = await unless_gone(receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, chunks, (headers or {}) | held_headers(first.held_s), tell_ledger=tell_ledger)


async def frames(
    first: TextEvent, rest: AsyncGenerator[TextEvent, None], chunks: Chunks, *, tell_ledger: bool = False
) -> AsyncGenerator[bytes, None]:
    """The stream's bytes. A failure is an event of its own, and then there is no [DONE].

    ``tell_ledger``: before [DONE], in a comment, which every reader of server-sent events passes over.
    """
    timing = b""
    usage, opening = None, b"".join(map(frame, chunks.opening()))
    try:
        event: TextEvent | None = first
        while event is not None:
            usage, written = event.usage or usage, opening + b"".join(map(frame, chunks.of(event)))
            if tell_ledger and event.ledger is not None:
                timing = f": server-timing {event.ledger.server_timing()}\n\n".encode()
            if written:
                yield written
                opening = b""
            event = await anext(rest, None)
        if usage is None:
            raise RuntimeError("the service ended a stream without its last event")
    except Exception as error:
        yield opening + b"".join(map(frame, chunks.failing(describe(error))))
        return
    yield b"".join(map(frame, chunks.closing(usage))) + timing + DONE


def frame(chunk: dict[str, Any]) -> bytes:
    """One event. An API whose chunks have a type names it as the event's, too."""
    name = f"event: {chunk['type']}\n".encode() if "type" in chunk else b""
    return name + b"data: " + msgspec.json.encode(chunk) + b"\n\n"  # JSON has no raw line ends, so one data line is enough
