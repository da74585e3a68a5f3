"""Place 2 of a request: counts the requests being answered, refuses new ones while the server drains, and ends the rest when it stops.

A server that refuses requests reports that it is not ready, so load balancers send elsewhere; requests already accepted run to their end,
or until `DrainGate.end_requests`.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

from serve.errors import Draining, ServerStopped
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent
from serve.service_api import ServiceApi, ServiceWrapper

R = TypeVar("R", bound=AnyRequest)
T = TypeVar("T")

UNREAD_S = 2.0
"""How long `DrainGate.end_requests` waits for streams that it has ended: one whose client does not read cannot take its error."""


class DrainGate(ServiceWrapper):
    """A service that can stop accepting requests, and end those that it has accepted."""

    def __init__(self, inner: ServiceApi, *, on_refusal: Callable[[AnyRequest, Draining], None] = lambda request, error: None) -> None:
        """``on_refusal``: told of each request that is refused. The inner service, with its observers, does not see these."""
        super().__init__(inner)
        self._on_refusal = on_refusal
        self.draining = False
        """Whether the server refuses new requests, or has given notice that it will (`drain`)."""
        self._is_refusing = False
        self._notice: asyncio.TimerHandle | None = None
        """Runs until new requests are refused."""
        self._stopping = False
        self.has_ended_requests = False
        """Whether the server is being stopped, and the grace of the requests that were open is over."""
        self._open: set[_OpenRequest] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self._open)

    def drain(self, *, notice_s: float = 0.0) -> float:
        """Refuse new requests, after ``notice_s`` if the server does not drain yet. Returns the seconds until then.

        With notice, the server is ready and accepts requests for that long, while `draining` says already that they belong elsewhere.
        """
        if notice_s > 0.0 and not self.draining:
            self._notice = asyncio.get_running_loop().call_later(notice_s, self._refuse)
        self.draining = True
        if notice_s == 0.0:
            self._refuse()
        return 0.0 if self._notice is None else max(self._notice.when() - asyncio.get_running_loop().time(), 0.0)

    def reopen(self) -> None:
        """Accept requests again, unless the server is being stopped (`end_requests`)."""
        if not self._stopping:
            self._end_notice()
            self.draining = self._is_refusing = False

    def _refuse(self) -> None:
        self._end_notice()
        self._is_refusing = True

    def _end_notice(self) -> None:
        if self._notice is not None:
            self._notice.cancel()
            self._notice = None

    async def end_requests(self, grace_s: float) -> None:
        """Refuse new requests for good, let the open ones run for at most ``grace_s``, then end the rest with `ServerStopped`.

        Returns when none is open. To shorten the grace, call it again meanwhile, or cancel it.
        """
        self._stopping = True
        self.drain()
        try:
            await self._wait_until_none_is_open(grace_s)
        finally:
            self.has_ended_requests = True
            for request in tuple(self._open):
                request.end()
        await self._wait_until_none_is_open(UNREAD_S)

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._counted(self._inner.chat, request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._counted(self._inner.complete, request)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        with self._count_open(request) as open_request:
            return await open_request.result_of(lambda: self._inner.collect(request))

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        with self._count_open(request) as open_request:
            return await open_request.result_of(lambda: self._inner.embed(request))

    def ready(self) -> bool:
        return not self._is_refusing and super().ready()

    def readiness(self) -> Mapping[str, bool]:
        return {name: ready and not self._is_refusing for name, ready in super().readiness().items()}

    async def _counted(self, answer: Callable[[R], AsyncGenerator[TextEvent, None]], request: R) -> AsyncGenerator[TextEvent, None]:
        """The events of a request, which is open until they end.

        Raises:
            Draining: no new requests are accepted.
            ServerStopped: the request was ended.
        """
        with self._count_open(request) as open_request:
            async with aclosing(answer(request)) as events:
                while (event := await open_request.result_of(lambda: anext(events, None))) is not None:
                    open_request.is_complete = event.usage is not None
                    yield event

    @contextmanager
    def _count_open(self, request: AnyRequest) -> "Iterator[_OpenRequest]":
        """Count a request as open, unless the server refuses new ones.

        Raises:
            Draining: no new requests are accepted.
        """
        if self._is_refusing:
            error = Draining()
            self._on_refusal(request, error)
            raise error
        open_request = _OpenRequest()
        self._open.add(open_request)
        self._none_open.clear()
        try:
            yield open_request
        finally:
            self._open.discard(open_request)
            if not self._open:
                self._none_open.set()

    async def _wait_until_none_is_open(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none_open.wait(), timeout_s)


class _OpenRequest:
    """A request that can be ended from outside, like a block of `asyncio.timeout`, but at a tenth of its cost per event."""

    def __init__(self) -> None:
        self._waiting: asyncio.Task[Any] | None = None
        """What waits for the request's next event; every event may have another task."""
        self._is_ended = False
        self.is_complete = False
        """Whether the last event has passed: only the end of the stream is missing, so there is nothing to end with an error."""

    def end(self) -> None:
        """Make `result_of` raise: at once where it waits, else when it is called next. Not if the answer is complete."""
        if self._is_ended or self.is_complete:
            return
        self._is_ended = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def result_of(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``, which is not begun if the request has been ended.

        Raises:
            ServerStopped: the request was ended.
        """
        self._raise_if_ended()
        task = self._waiting = asyncio.current_task()
        assert task is not None
        num_cancels = task.cancelling()
        try:
            return await work()
        except asyncio.CancelledError:
            if self._is_ended and task.uncancel() <= num_cancels:
                raise ServerStopped from None
            raise  # the client has gone as well
        finally:
            self._waiting = None

    def _raise_if_ended(self) -> None:
        if self._is_ended:
            raise ServerStopped
