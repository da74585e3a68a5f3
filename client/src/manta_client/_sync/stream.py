# Generated from `_async/stream.py` by client/unasync.py. Do not edit.
"""A streamed answer."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import grpc

from ..answers import ChatCompletion, Completion, Delta, Usage
from ..assembly import Assembly
from ..errors import CallFailed, StreamBroken
from .transport import EventStream, StreamingCall

Answer = TypeVar("Answer", ChatCompletion, Completion)

INCOMPLETE = "cut"
"""Reason of a stream whose call ended without an error, but before its answer did."""


class Stream(Generic[Answer]):
    """Iterates over the deltas of an answer. The call is made when the first delta is read.

    If the connection or the server breaks, another call asks for the rest; only the pause is noticeable. Leaving the context manager, or
    `close`, cancels the call if the stream has not ended.
    """

    def __init__(self, begin: Callable[[], tuple[StreamingCall, Assembly[Answer]]]) -> None:
        self._begin: Callable[[], tuple[StreamingCall, Assembly[Answer]]] = begin
        self._call: StreamingCall | None = None
        self._events: EventStream | None = None
        self._assembly: Assembly[Answer] | None = None
        self._over = False

    @property
    def id(self) -> str:
        """The server's id of the request; empty before the first event."""
        return self._assembly.id if self._assembly else ""

    @property
    def text(self) -> str:
        """The text of the first choice so far."""
        return self._assembly.text() if self._assembly else ""

    @property
    def usage(self) -> Usage | None:
        """Token counts, once the stream has ended."""
        return self._assembly.usage if self._assembly else None

    def final(self) -> Answer:
        """Read the rest, and return the whole answer.

        Raises:
            CallFailed: the request failed.
            StreamBroken: the stream ended, or was closed, before its answer did.
        """
        for _ in self:
            pass
        if self._assembly is None:
            raise StreamBroken("the stream was closed before it began")
        return self._assembly.answer()

    def close(self) -> None:
        """Cancel the call, so that the server stops working on it. Does nothing if it has ended."""
        self._over = True
        if self._events is not None:
            self._events.cancel()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        while not self._over:
            delta = self._advance()
            if delta is not None:
                return delta
        raise StopIteration

    def __enter__(self) -> "Stream[Answer]":
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        if self._events is None and not self._over:
            self._call, self._assembly = self._begin()
            self._events = self._call.open()

    def _advance(self) -> Delta | None:
        """Process one event. Returns its delta, if it has one."""
        self._open()
        assert self._events is not None
        assert self._call is not None
        assert self._assembly is not None
        try:
            event = self._events.next()
            if event is not None and event.WhichOneof("event") != "error":
                self._call.progressed()
            if event is not None:
                return self._assembly.add(event)
            if not self._over and not self._assembly.is_whole:  # a stream that was closed here may be incomplete
                raise CallFailed("the stream ended early", code=grpc.StatusCode.UNAVAILABLE, reason=INCOMPLETE)
            self._over = True
            return None
        except CallFailed as failure:
            self._events.cancel()
            self._resume(self._call, self._assembly, failure)
            return None
        except BaseException:
            self.close()
            raise

    def _resume(self, call: StreamingCall, assembly: Assembly[Answer], failure: CallFailed) -> None:
        """Ask for the rest, if the answer is not complete.

        Raises:
            CallFailed, StreamBroken: the rest cannot be had.
        """
        if assembly.is_whole or self._over:
            self._over = True
            return
        try:
            self._events = call.reopen(failure, assembly.so_far())
            if self._over:  # closed by another task or thread in the meantime
                self._events.cancel()
        except CallFailed as last:
            self._over = True
            if last.reason == INCOMPLETE:
                assembly.answer()  # raises StreamBroken
            raise last from None
        except BaseException:
            self.close()
            raise
