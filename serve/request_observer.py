"""Interface for code that follows requests from start to end: metrics, tracing, quotas. The service depends on this interface only."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from serve.errors import ServerStopped, code_of
from serve.request import AnyRequest, TextEvent

CLIENT_LEFT = "client_left"
STOPPED = "stopped"


class RequestWatch(Protocol):
    """Observes one request. Exactly one of `ended` and `failed` is called, as the last call."""

    def event(self, event: TextEvent) -> None: ...

    def ended(self) -> None:
        """The request's last event has been delivered."""
        ...

    def failed(self, error: BaseException) -> None:
        """The request ended early. `asyncio.CancelledError` and `GeneratorExit` mean that its client went away, `ServerStopped` that the
        server ended it because it is being stopped."""
        ...


class Observer(Protocol):
    def begin(self, request: AnyRequest) -> RequestWatch:
        """Called when a request starts. May raise to reject the request; observers called before are told that it failed."""
        ...


def failure_code(error: BaseException) -> str:
    """How metrics and traces name a failure: by the error's code, except for two that are told apart only here. A client that has left
    receives no code, and one whose request a stopping server ends receives the same as one that is refused before (``draining``)."""
    if is_leaving(error):
        return CLIENT_LEFT
    return STOPPED if isinstance(error, ServerStopped) else code_of(error)


async def observe_events(
    request: AnyRequest,
    events: AsyncGenerator[TextEvent, None],
    observers: Sequence[Observer],
    *,
    requests_are_ended: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[TextEvent, None]:
    """Yield ``events`` and pass each to all ``observers``.

    ``requests_are_ended``: whether the server has ended all requests (`DrainGate.end_requests`). Here that looks as if their clients had
    left.
    """
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
        _close(watches, _failure(error, complete=complete, requests_are_ended=requests_are_ended))
        raise
    _close(watches, None)


def is_leaving(error: BaseException) -> bool:
    """Whether the consumer stopped iterating."""
    return isinstance(error, GeneratorExit | asyncio.CancelledError)


def _failure(error: BaseException, *, complete: bool, requests_are_ended: Callable[[], bool]) -> BaseException | None:
    """What observers are told of ``error``. After the last event leaving is no failure: a consumer need not read to the end."""
    if not is_leaving(error):
        return error
    if complete:
        return None
    return ServerStopped() if requests_are_ended() else error


def _close(watches: Sequence[RequestWatch], error: BaseException | None) -> None:
    for watch in watches:
        if error is None:
            watch.ended()
        else:
            watch.failed(error)
