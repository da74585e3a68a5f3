"""An answer while it is being made."""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Generic, TypeVar

import grpc

from ..answers import ChatCompletion, Completion, Delta, Usage
from ..assembly import Assembly
from ..errors import CallFailed, StreamBroken
from .transport import AsyncAsked, AsyncEventStream

Answer = TypeVar("Answer", ChatCompletion, Completion)

CUT = "cut"
"""Reason of a stream whose call ended well and whose answer did not end."""


class AsyncStream(Generic[Answer]):
    """Deltas of an answer, by iteration. The call begins when first something is wanted of it.

    Where the way to the server breaks, or the server behind it, the rest is asked for in another call, which is not noticed but
    by the pause. As a context manager it cancels the call on the way out if its end was not reached, and so does `close`.
    """

    def __init__(self, begin: Callable[[], Awaitable[tuple[AsyncAsked, Assembly[Answer]]]]) -> None:
        self._begin: Callable[[], Awaitable[tuple[AsyncAsked, Assembly[Answer]]]] = begin
        self._asked: AsyncAsked | None = None
        self._events: AsyncEventStream | None = None
        self._assembly: Assembly[Answer] | None = None
        self._over = False

    @property
    def id(self) -> str:
        """What the server calls the request; empty before the first event."""
        return self._assembly.id if self._assembly else ""

    @property
    def text(self) -> str:
        """The text so far, of the first choice."""
        return self._assembly.text() if self._assembly else ""

    @property
    def usage(self) -> Usage | None:
        """Token counts, once the stream has ended."""
        return self._assembly.usage if self._assembly else None

    async def final(self) -> Answer:
        """Read the rest and give the whole answer.

        Raises:
            CallFailed: the request failed.
            StreamBroken: the stream ended, or was closed, before its answer did.
        """
        async for _ in self:
            pass
        if self._assembly is None:
            raise StreamBroken("the stream was closed before it began")
        return self._assembly.answer()

    async def close(self) -> None:
        """Cancel the call; the server stops working on it. Nothing happens if it has ended."""
        self._over = True
        if self._events is not None:
            self._events.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._over:
            delta = await self._advance()
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def __aenter__(self) -> "AsyncStream[Answer]":
        await self._open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _open(self) -> None:
        if self._events is None and not self._over:
            self._asked, self._assembly = await self._begin()
            self._events = await self._asked.open()

    async def _advance(self) -> Delta | None:
        """Take in one event; its delta, if it is one."""
        await self._open()
        assert self._events is not None
        assert self._asked is not None
        assert self._assembly is not None
        try:
            event = await self._events.next()
            if event is not None and event.WhichOneof("event") != "error":
                self._asked.progressed()
            if event is not None:
                return self._assembly.add(event)
            if not self._over and not self._assembly.is_whole:  # one that was closed here need not be
                raise CallFailed("cut", code=grpc.StatusCode.UNAVAILABLE, reason=CUT)
            self._over = True
            return None
        except CallFailed as failure:
            self._events.cancel()
            await self._go_on(self._asked, self._assembly, failure)
            return None
        except BaseException:
            await self.close()
            raise

    async def _go_on(self, asked: AsyncAsked, assembly: Assembly[Answer], failure: CallFailed) -> None:
        """Have the rest sent, if there is one.

        Raises:
            CallFailed, StreamBroken: it cannot be had.
        """
        if assembly.is_whole or self._over:
            self._over = True
            return
        try:
            self._events = await asked.reopen(failure, assembly.so_far())
            if self._over:  # closed from elsewhere in the meantime
                self._events.cancel()
        except CallFailed as last:
            self._over = True
            if last.reason == CUT:
                assembly.answer()  # says so
            raise last from None
        except BaseException:
            await self.close()
            raise
