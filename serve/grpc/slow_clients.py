"""Place 14 of a request over gRPC, in the proxy: ends the stream of a client that does not read, or has gone while it was sent to."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

SLICES = 20
Stream = Callable[[Any, Any], AsyncGenerator[Any, None]]


def abort_slow_clients(handler: grpc.RpcMethodHandler, limit_s: float) -> grpc.RpcMethodHandler:
    """The handler, whose streams end if a message is not taken within ``limit_s`` (the client's flow-control window is full, and it does
    not read). The source is cancelled as if the client had disconnected. If the client reads again, it gets an error.

    The source is also cancelled if gRPC leaves the stream while a message is sent, as it does if the client cancels then: it does not close
    the generator, so the event loop does. Ray Serve's own generator, closed like this, would neither end nor cancel the call behind it.
    """
    return handler if handler.unary_stream is None else handler._replace(unary_stream=_aborting(handler.unary_stream, limit_s))


def _aborting(stream: Stream, limit_s: float) -> Stream:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        loop, cancelling = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        messages = stream(request, context)
        async for message in messages:
            timeout = _ReadTimeout(limit_s, lambda: cancelling.append(loop.create_task(_cancel(messages))))
            is_taken = False
            try:
                yield message  # returns when gRPC has taken the message
                is_taken = True
            finally:
                timeout.stop()
                if not is_taken:
                    await (cancelling[0] if cancelling else _cancel(messages))
            if cancelling:
                await cancelling[0]
                await context.abort(grpc.StatusCode.ABORTED, f"nothing of this stream was read for {limit_s:g} s")

    return unary_stream


class _ReadTimeout:
    """Calls ``expired`` after ``limit_s``, counted in slices.

    A time in which this process itself was blocked uses up one slice, however long it was, so that the client still has time to read.
    """

    def __init__(self, limit_s: float, expired: Callable[[], None]) -> None:
        self._slice_s, self._expired = limit_s / SLICES, expired
        self._left = SLICES
        self._next_slice()

    def _next_slice(self) -> None:
        if not self._left:
            self._expired()
            return
        self._left -= 1
        self._timer = asyncio.get_running_loop().call_later(self._slice_s, self._next_slice)

    def stop(self) -> None:
        self._timer.cancel()


async def _cancel(messages: AsyncGenerator[Any, None]) -> None:
    """Ray Serve cancels the call behind a stream only if it is itself cancelled while it waits for the next message."""
    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
        while True:
            waiting = asyncio.ensure_future(anext(messages))
            await asyncio.sleep(0)
            waiting.cancel()
            await waiting
