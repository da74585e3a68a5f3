"""Place 2 of a request: counts the requests being answered, and refuses new ones while the server drains.

A draining server reports that it is not ready, so load balancers send elsewhere; requests already accepted run to their end.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from serve.errors import Draining
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent
from serve.service_api import ServiceApi, ServiceWrapper


class DrainGate(ServiceWrapper):
    """A service that can stop accepting requests."""

    def __init__(self, inner: ServiceApi) -> None:
        super().__init__(inner)
        self.draining = False
        self.num_open = 0
        """Requests that are being answered."""

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    def reopen(self) -> None:
        self.draining = False

    async def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        with self._count_open():
            async with aclosing(self._inner.chat(request)) as events:
                async for event in events:
                    yield event

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        with self._count_open():
            async with aclosing(self._inner.complete(request)) as events:
                async for event in events:
                    yield event

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        with self._count_open():
            return await self._inner.collect(request)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        with self._count_open():
            return await self._inner.embed(request)

    def ready(self) -> bool:
        return not self.draining and super().ready()

    def readiness(self) -> Mapping[str, bool]:
        return {name: ready and not self.draining for name, ready in super().readiness().items()}

    @contextmanager
    def _count_open(self) -> Iterator[None]:
        """Count a request as open, unless the server is draining.

        Raises:
            Draining: no new requests are accepted.
        """
        if self.draining:
            raise Draining
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
