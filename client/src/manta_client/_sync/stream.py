# Generated from `_async/stream.py` by client/unasync.py. Do not edit.
"""An answer while it is being made."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from ..answers import ChatCompletion, Completion, Delta, Usage
from ..assembly import Assembly
from ..errors import StreamBroken
from .transport import EventStream

Answer = TypeVar("Answer", ChatCompletion, Completion)


class Stream(Generic[Answer]):
    """Deltas of an answer, by iteration. The call begins when first something is wanted of it.

    As a context manager it cancels the call on the way out if its end was not reached, and so does `close`.
    """

    def __init__(self, begin: Callable[[], tuple[EventStream, Assembly[Answer]]]) -> None:
        self._begin: Callable[[], tuple[EventStream, Assembly[Answer]]] = begin
        self._events: EventStream | None = None
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

    def final(self) -> Answer:
        """Read the rest and give the whole answer.

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
        """Cancel the call; the server stops working on it. Nothing happens if it has ended."""
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
            self._events, self._assembly = self._begin()

    def _advance(self) -> Delta | None:
        """Take in one event; its delta, if it is one."""
        self._open()
        assert self._events is not None
        assert self._assembly is not None
        try:
            event = self._events.next()
            if event is not None:
                return self._assembly.add(event)
            if not self._over:
                self._over = True
                self._assembly.answer()  # raises if the stream is not whole; one that was closed here need not be
            return None
        except BaseException:
            self.close()
            raise
