"""Several models under one roof: a service for each, chosen by the name that a request gives."""

from collections.abc import AsyncGenerator, Mapping, Sequence

from serve.errors import ModelNotFound
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent, TokenizeRequest
from serve.service import Service


class Catalog:
    """What both fronts ask. Every request goes to its model's `Service`; what concerns no single one is answered for all."""

    def __init__(self, services: Sequence[Service]) -> None:
        """Raises ValueError where there is no service, or two of one name."""
        self._services = {facts.name: service for service in services for facts in service.models()}
        if not services or len(self._services) != len(services):
            raise ValueError(f"a catalog needs services with names of their own, got {[service.models()[0].name for service in services]}")
        self._first = services[0]

    @property
    def limits(self) -> Limits:
        """The same for all models: they are checked before it is known which is asked for."""
        return self._first.limits

    def service(self, name: str) -> Service:
        """
        Raises:
            ModelNotFound: it is not offered.
        """
        if name not in self._services:
            raise ModelNotFound(name, list(self._services))
        return self._services[name]

    def models(self) -> tuple[ModelFacts, ...]:
        """What this server offers, in the order of its settings."""
        return tuple(facts for service in self._services.values() for facts in service.models())

    def model(self, name: str) -> ModelFacts:
        """Raises ModelNotFound."""
        return self.service(name).model(name)

    def ready(self) -> bool:
        """Whether there is a model that would answer now. One that is loading, or lost, must not take the others' front away."""
        return any(self.readiness().values())

    def readiness(self) -> Mapping[str, bool]:
        """Whether a request would be answered now, for each model by its name."""
        return {name: service.ready() for name, service in self._services.items()}

    async def warm_up(self) -> None:
        """Each model's, one after the other."""
        for service in self._services.values():
            await service.warm_up()

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._of(request).chat(request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._of(request).complete(request)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        return await self._of(request).collect(request)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        return await self._of(request).embed(request)

    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
        return await self.service(request.model).tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await self.service(model).detokenize(model, ids)

    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        return await self.service(model).token_texts(model, ids)

    def _of(self, request: AnyRequest) -> Service:
        """An unknown name is refused by whichever service gets it, at the same moment as everything else that is wrong."""
        return self._services.get(request.model, self._first)
