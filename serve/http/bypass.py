"""Streams past Ray over HTTP: both ends of `serve.bypass` as layers of ASGI apps."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

import serve.bypass
from cluster.bypass import PiecesLost
from serve.bypass import Passages, Ways

HEADER = serve.bypass.HEADER.encode()
WAY = "manta.bypass"
"""In a front's scope: the `serve.bypass.Way`, if there is one."""
PASSED = "manta_bypassed"
"""In a message: of the first the answer's number (`cluster.bypass.new_answer_number`), of the last how many pieces there were."""


class ProxyBypass:
    """Before Ray Serve's proxy: hands on what comes by the socket as if it had come by Ray."""

    def __init__(self, app: ASGIApp, *, passages: Passages) -> None:
        self._app, self._passages = app, passages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (passage := self._passages.open()) is None:
            return await self._app(scope, receive, send)
        pump: asyncio.Task[None] | None = None
        header = (HEADER, self._passages.told(passage).encode())

        async def hand_on() -> None:
            num_taken = 0
            while pieces := await passage.take(num_taken, serve.bypass.LATE_S):
                num_taken += len(pieces)
                await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})

        async def send_in_order(message: Message) -> None:
            nonlocal pump
            passed = message.pop(PASSED, None)
            if passed is not None and pump is not None:
                passage.end_after(passed)
                try:
                    await pump
                except PiecesLost as lost:
                    self._passages.pause(str(lost))
                    raise
            await send(message)
            if passed is not None and pump is None:
                passage.begin(passed)
                pump = asyncio.create_task(hand_on())

        try:
            await self._app({**scope, "headers": [*scope["headers"], header]}, receive, send_in_order)
        finally:
            passage.close()
            if pump is not None:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # what it raised was raised to whoever sent the end
                    await pump


class FrontBypass:
    """Before a front: tells the app whether there is a way for the pieces of its answer."""

    def __init__(self, app: ASGIApp, *, ways: Ways) -> None:
        self._app, self._ways = app, ways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            told = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER]
            kept = [(name, value) for name, value in scope["headers"] if name != HEADER]
            scope = {**scope, "headers": kept, WAY: self._ways.as_told(told)}
        await self._app(scope, receive, send)
