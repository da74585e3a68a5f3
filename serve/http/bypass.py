"""The two ends of `serve.bypass` as ASGI middleware."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

import serve.bypass
from cluster.bypass import ChunksLost
from serve.bypass import FrontEndpoint, ProxyEndpoint

HEADER = serve.bypass.HEADER.encode()
BYPASS_STREAM = "manta.bypass"
"""Key of the `serve.bypass.BypassStream`, or None, in a front's ASGI scope."""
PASSED = "manta_bypassed"
"""Key in an ASGI message: in the first the response's number (`cluster.bypass.new_answer_number`), in the last the number of chunks."""


class ProxyBypass:
    """Middleware in Ray Serve's proxy: sends the client what comes over the socket as if it had come through Ray."""

    def __init__(self, app: ASGIApp, *, endpoint: ProxyEndpoint) -> None:
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (incoming := self._endpoint.open()) is None:
            return await self._app(scope, receive, send)
        forwarding: asyncio.Task[None] | None = None
        header = (HEADER, self._endpoint.header_value(incoming).encode())

        async def forward_chunks() -> None:
            num_taken = 0
            while chunks := await incoming.take(num_taken, serve.bypass.LATE_S):
                num_taken += len(chunks)
                await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})

        async def send_in_order(message: Message) -> None:
            """Sends the beginning at once, and the end only after all chunks."""
            nonlocal forwarding
            passed = message.pop(PASSED, None)
            if passed is not None and forwarding is not None:
                incoming.end_after(passed)
                try:
                    await forwarding
                except ChunksLost as lost:
                    self._endpoint.pause(str(lost))
                    raise
            await send(message)
            if passed is not None and forwarding is None:
                incoming.begin(passed)
                forwarding = asyncio.create_task(forward_chunks())

        try:
            await self._app({**scope, "headers": [*scope["headers"], header]}, receive, send_in_order)
        finally:
            incoming.close()
            if forwarding is not None:
                forwarding.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # `send_in_order` has raised its error already
                    await forwarding


class FrontBypass:
    """Middleware in a front: puts the stream for the chunks of the response into the scope, and hides the header from the app."""

    def __init__(self, app: ASGIApp, *, bypass: FrontEndpoint) -> None:
        self._app, self._bypass = app, bypass

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            values = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER]
            kept = [(name, value) for name, value in scope["headers"] if name != HEADER]
            scope = {**scope, "headers": kept, BYPASS_STREAM: self._bypass.stream_for(values)}
        await self._app(scope, receive, send)
