"""Interface for code that follows requests from start to end: metrics, tracing, quotas. The service depends on this interface only."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from serve.request import AnyRequest, TextEvent


class RequestWatch(Protocol):
    """Observes one request. Exactly one of `ended` and `failed` is called, as the last call."""

    def event(self, event: TextEvent) -> None: ...

    def ended(self) -> None:
        """The request's last event has been delivered."""
        ...

    def failed(self, error: BaseException) -> None:
        """The request ended early. `asyncio.CancelledError` and `GeneratorExit` mean that its client went away."""
        ...


class Observer(Protocol):
    def begin(self, request: AnyRequest) -> RequestWatch:
        """Called when a request starts. May raise to reject the request; observers called before are told that it failed."""
        ...


async def observe_events(
    request: AnyRequest, events: AsyncGenerator[TextEvent, None], observers: Sequence[Observer]
) -> AsyncGenerator[TextEvent, None]:
    """Yield ``events`` and pass each to all ``observers``."""
    watches: list[RequestWatch] = []
    complete = False
    try:
        for observer in observers:
            watches.append(observer.begin(request))  # one by one: if one raises, those before it must be told
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
    """Whether the consumer stopped iterating. After the last event that is no failure: it need not read to the end."""
    return isinstance(error, GeneratorExit | asyncio.CancelledError)


def _close(watches: Sequence[RequestWatch], error: BaseException | None) -> None:
    for watch in watches:
        if error is None:
            watch.ended()
        else:
            watch.failed(error)
