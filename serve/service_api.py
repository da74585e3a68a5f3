"""The interface that the HTTP and gRPC APIs call.

`Service` implements it for one model and `Catalog` for several; `DrainGate` and `IdempotentService` wrap either.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent, TokenizeRequest


class ServiceApi(Protocol):
    """See `Service` for what each method does and raises."""

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


class ServiceWrapper:
    """Base of the wrappers: forwards every call that they do not override."""

    def __init__(self, inner: ServiceApi) -> None:
        self._inner = inner

    def ready(self) -> bool:
        return self._inner.ready()

    def readiness(self) -> Mapping[str, bool]:
        return self._inner.readiness()

    @property
    def limits(self) -> Limits:
        return self._inner.limits

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        return await self._inner.embed(request)

    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
        return await self._inner.tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await self._inner.detokenize(model, ids)

    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        return await self._inner.token_texts(model, ids)

    def models(self) -> tuple[ModelFacts, ...]:
        return self._inner.models()

    def model(self, name: str) -> ModelFacts:
        return self._inner.model(name)
