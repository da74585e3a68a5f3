"""What both fronts ask: a `Service` for one model, a `Catalog` for several, `Doors` and `OncePerKey` before either."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent, TokenizeRequest


class Offers(Protocol):
    """See `Service`, which says of each what it does and raises."""

    @property
    def limits(self) -> Limits: ...
    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]: ...
    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]: ...
    async def collect(self, request: ChatRequest | CompletionRequest) -> Result: ...
    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult: ...
    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]: ...
    async def detokenize(self, model: str, ids: Sequence[int]) -> str: ...
    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]: ...
    def models(self) -> tuple[ModelFacts, ...]: ...
    def model(self, name: str) -> ModelFacts: ...
    def ready(self) -> bool: ...
    def readiness(self) -> Mapping[str, bool]: ...


class Passing:
    """Stands before what offers models, and passes on to it whatever is no request for an answer."""

    def __init__(self, inside: Offers) -> None:
        self._inside = inside

    def ready(self) -> bool:
        return self._inside.ready()

    def readiness(self) -> Mapping[str, bool]:
        return self._inside.readiness()

    @property
    def limits(self) -> Limits:
        return self._inside.limits

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        return await self._inside.embed(request)

    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
        return await self._inside.tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await self._inside.detokenize(model, ids)

    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        return await self._inside.token_texts(model, ids)

    def models(self) -> tuple[ModelFacts, ...]:
        return self._inside.models()

    def model(self, name: str) -> ModelFacts:
        return self._inside.model(name)
