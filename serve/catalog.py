"""Several models in one server: sends each request to the service of the model that it names."""

from collections.abc import AsyncGenerator, Mapping, Sequence

from serve.errors import ModelNotFound
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, TextEvent, TokenizeRequest
from serve.service import Service


class Catalog:
    """A `ServiceApi` over several `Service`s. What does not concern a single model is answered for all."""

    def __init__(self, services: Sequence[Service]) -> None:
        """
        Raises:
            ValueError: there is no service, or two have the same name.
        """
        self._services = {facts.name: service for service in services for facts in service.models()}
        if not services or len(self._services) != len(services):
            raise ValueError(f"a catalog needs services with names of their own, got {[service.models()[0].name for service in services]}")
        self._first = services[0]

    @property
    def limits(self) -> Limits:
        """The same for all models, because they are checked before the model is known."""
        return self._first.limits

    def service(self, name: str) -> Service:
        """The service of the model of that name.

        Raises:
            ModelNotFound: it is not served here.
        """
        if name not in self._services:
            raise ModelNotFound(name, list(self._services))
        return self._services[name]

    def models(self) -> tuple[ModelFacts, ...]:
        """The models of this server, in the order of its settings."""
        return tuple(facts for service in self._services.values() for facts in service.models())

    def model(self, name: str) -> ModelFacts:
        """Raises ModelNotFound."""
        return self.service(name).model(name)

    def ready(self) -> bool:
        """Whether any model is ready. One that is loading or lost must not make the front unready for the others."""
        return any(self.readiness().values())

    def readiness(self) -> Mapping[str, bool]:
        """`Service.ready` by model name."""
        return {name: service.ready() for name, service in self._services.items()}

    async def warm_up(self) -> None:
        """Warms up the services, one after the other."""
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
        """For an unknown name, any service: it refuses the request at the same point as for any other mistake."""
        return self._services.get(request.model, self._first)
