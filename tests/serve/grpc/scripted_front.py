"""The front's own gRPC methods in a Ray Serve deployment, over a service that acts by the model's name."""

import dataclasses
from collections.abc import AsyncGenerator

from engine.errors import QueueFull
from serve.deployment import _Front
from serve.errors import InvalidRequest
from serve.grpc.health import HealthServicer
from serve.grpc.servicer import MantaServicer
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, TextEvent
from tests.serve.grpc.conftest import FACTS, ScriptedService

REFUSALS = {
    "bad": InvalidRequest("temperature must be between 0 and 2", param="temperature"),
    "full": QueueFull(limit=8, retry_after_s=2.5),
    "broken": RuntimeError("secret of the house"),
}


class ActingService(ScriptedService):
    """Model "holds" stops after two events; the names above refuse at once, "late-" before them after one event."""

    def __init__(self) -> None:
        super().__init__()
        self.num_closed = 0

    def models(self) -> tuple[ModelFacts, ...]:
        """How many streams have ended, told as a model's name."""
        return (dataclasses.replace(FACTS, name=f"closed-{self.num_closed}"),)

    async def _events(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        self.holds_at = 2 if request.model == "holds" else None
        self.fails_at = None
        if (name := request.model.removeprefix("late-")) in REFUSALS:
            self.error, self.fails_at = REFUSALS[name], 1 if request.model.startswith("late-") else 0
        try:
            async for event in super()._events(request):
                yield event
        finally:
            self.num_closed += 1


class ScriptedFront:
    def __init__(self) -> None:
        service = ActingService()
        self._grpc = MantaServicer(service)  # type: ignore[arg-type]
        self._health = HealthServicer(service.ready)

    Chat, ChatStream, Generate, GenerateStream = _Front.Chat, _Front.ChatStream, _Front.Generate, _Front.GenerateStream
    ListModels, GetModel = _Front.ListModels, _Front.GetModel
    Check, List, Watch = _Front.Check, _Front.List, _Front.Watch
