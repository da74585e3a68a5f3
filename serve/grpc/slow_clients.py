"""Step 14 of a request over gRPC, in the proxy: a client that reads nothing of its stream is left after a while."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

SLICES = 20
Stream = Callable[[Any, Any], AsyncGenerator[Any, None]]


def leaving_slow(handler: grpc.RpcMethodHandler, limit_s: float) -> grpc.RpcMethodHandler:
    """The handler, whose streams end where a message is not taken within ``limit_s``: the client's window of flow control is full, and it
    does not read. The source is cancelled as if the client had left; should the client read again, an error is what comes next."""
    return handler if handler.unary_stream is None else handler._replace(unary_stream=_leaving(handler.unary_stream, limit_s))


def _leaving(stream: Stream, limit_s: float) -> Stream:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        loop, leaving = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        messages = stream(request, context)
        async for message in messages:
            patience = _Patience(limit_s, lambda: leaving.append(loop.create_task(_cancelled(messages))))
            try:
                yield message  # the writer comes back when gRPC has taken it
            finally:
                patience.end()
            if leaving:
                await leaving[0]
                await context.abort(grpc.StatusCode.ABORTED, f"nothing of this stream was read for {limit_s:g} s")

    return unary_stream


class _Patience:
    """Calls ``lost`` after ``limit_s``, in slices: a time in which this process stood still itself takes one of them, however long it was,
    so that a client that can read again has the time to."""

    def __init__(self, limit_s: float, lost: Callable[[], None]) -> None:
        self._slice_s, self._lost = limit_s / SLICES, lost
        self._left = SLICES
        self._again()

    def _again(self) -> None:
        if not self._left:
            self._lost()
            return
        self._left -= 1
        self._timer = asyncio.get_running_loop().call_later(self._slice_s, self._again)

    def end(self) -> None:
        self._timer.cancel()


async def _cancelled(messages: AsyncGenerator[Any, None]) -> None:
    """Ray Serve cancels the call behind a stream only where it is cancelled itself while it waits for the next message."""
    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
        while True:
            waiting = asyncio.ensure_future(anext(messages))
            await asyncio.sleep(0)
            waiting.cancel()
            await waiting
