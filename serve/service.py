"""Steps 3 and 13 of a request: text becomes one engine request per choice, and token events become text.

The one core under both fronts: HTTP and gRPC call only this.
"""

import time
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from engine.plan import TokenEvent
from engine.request import Request
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, Result, TextEvent
from serve.text.tokenizer import Tokenizer


class TokenSource(Protocol):
    """Answers engine requests with tokens: the router over replicas, or a scripted fake."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The choice's events in order of offset, none twice; the last one has a ``finish_reason``. ``aclose`` cancels the choice.

        A failure is either raised (an `EngineError`) or told by an event with ``finish_reason="error"``.
        """
        ...

    def ready(self) -> bool:
        """Whether a request sent now would be computed."""
        ...


class Service:
    """Offers one model."""

    def __init__(
        self,
        *,
        model: ModelFacts,
        tokenizer: Tokenizer,
        source: TokenSource,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None: ...

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        """The answer's events, all choices merged; the last event alone has ``usage``.

        Nothing is done before the first ``__anext__``. Whatever is wrong with the request, and a refusal for lack of room, is
        raised there, before any event: a front waits for the first event before it sends headers. ``aclose`` (or cancelling
        the task that waits in ``__anext__``) cancels every choice.

        Raises:
            ServeError, EngineError: see `serve.errors.WIRE`.
        """
        raise NotImplementedError

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        """As `chat`, for prompts without a template. Choice index = prompt index * n + choice."""
        raise NotImplementedError

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        """The whole answer at once."""
        raise NotImplementedError

    def models(self) -> tuple[ModelFacts, ...]:
        """What this server offers."""
        raise NotImplementedError

    def model(self, name: str) -> ModelFacts:
        """
        Raises:
            ModelNotFound: it is not offered.
        """
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether a request sent now would be answered."""
        raise NotImplementedError
