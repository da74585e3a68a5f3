"""Step 2 of a request: the door before the service. It counts who is inside, and can be closed to those who come.

While it is closed the server is not ready, so load balancers send elsewhere; what is inside goes on to its end.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from serve.errors import Draining
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent
from serve.service_api import Offers, Passing


class Doors(Passing):
    """What both fronts ask, as long as it is open."""

    def __init__(self, inside: Offers) -> None:
        super().__init__(inside)
        self.draining = False
        self.num_open = 0
        """Requests that are being answered."""

    def drain(self) -> None:
        """Let nobody in."""
        self.draining = True

    def reopen(self) -> None:
        self.draining = False

    async def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        with self._entered():
            async with aclosing(self._inside.chat(request)) as events:
                async for event in events:
                    yield event

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        with self._entered():
            async with aclosing(self._inside.complete(request)) as events:
                async for event in events:
                    yield event

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        with self._entered():
            return await self._inside.collect(request)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        with self._entered():
            return await self._inside.embed(request)

    def ready(self) -> bool:
        return not self.draining and super().ready()

    def readiness(self) -> Mapping[str, bool]:
        return {name: ready and not self.draining for name, ready in super().readiness().items()}

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if self.draining:
            raise Draining
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
