"""Watching requests from arrival to end, for those that count, trace or log: the service knows only this seam."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from serve.request import AnyRequest, TextEvent


class RequestWatch(Protocol):
    """Follows one request. Exactly one of `ended` and `failed` is called, last."""

    def event(self, event: TextEvent) -> None: ...

    def ended(self) -> None:
        """Its last event has been handed on."""
        ...

    def failed(self, error: BaseException) -> None:
        """It ended otherwise. `asyncio.CancelledError` and `GeneratorExit`: its client did not want more."""
        ...


class Observer(Protocol):
    def begin(self, request: AnyRequest) -> RequestWatch:
        """May raise to refuse the request; earlier observers are told that it failed."""
        ...


async def observe_events(
    request: AnyRequest, events: AsyncGenerator[TextEvent, None], observers: Sequence[Observer]
) -> AsyncGenerator[TextEvent, None]:
    """``events``, seen by all ``observers`` as they pass."""
    watches: list[RequestWatch] = []
    complete = False
    try:
        for observer in observers:
            watches.append(observer.begin(request))  # not all at once: those before the one that refuses must be told
        async with aclosing(events):
            async for event in events:
                complete = event.usage is not None
                for watch in watches:
                    watch.event(event)
                yield event
    except BaseException as error:
        _close(watches, None if complete and _is_leaving(error) else error)
        raise
    _close(watches, None)


def _is_leaving(error: BaseException) -> bool:
    """A reader that has had the last event need not ask for the end."""
    return isinstance(error, GeneratorExit | asyncio.CancelledError)


def _close(watches: Sequence[RequestWatch], error: BaseException | None) -> None:
    for watch in watches:
        if error is None:
            watch.ended()
        else:
            watch.failed(error)
