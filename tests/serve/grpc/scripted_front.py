"""The front's own gRPC methods in a Ray Serve deployment, over a service that acts by the model's name."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncGenerator

import ray

from engine.errors import QueueFull
from serve.bypass import BypassStream, FrontEndpoint
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


class CountingWays(FrontEndpoint):
    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.num_found = 0

    def stream_for(self, headers: list[str]) -> BypassStream | None:
        stream = super().stream_for(headers)
        self.num_found += stream is not None
        return stream


class ActingService(ScriptedService):
    """Model "holds" stops after two events, "dies" takes the process along; the names above refuse at once, "late-" before them after one
    event."""

    def __init__(self, bypass: CountingWays) -> None:
        super().__init__()
        self.num_closed, self._bypass = 0, bypass

    def models(self) -> tuple[ModelFacts, ...]:
        """How many streams have ended, and how many went past Ray, told as models' names."""
        counts = {"closed": self.num_closed, "past": self._bypass.num_found}
        return tuple(dataclasses.replace(FACTS, name=f"{what}-{count}") for what, count in counts.items())

    async def _events(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        self.holds_at = 2 if request.model in ("holds", "dies") else None
        self.fails_at = None
        if (name := request.model.removeprefix("late-")) in REFUSALS:
            self.error, self.fails_at = REFUSALS[name], 1 if request.model.startswith("late-") else 0
        try:
            async for event in super()._events(request):
                yield event
                if request.model == "dies" and event.text == "é":
                    await asyncio.sleep(0.5)  # what was sent is on its way
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            self.num_closed += 1


class ScriptedFront:
    def __init__(self) -> None:
        self._bypass = CountingWays(ray.get_runtime_context().get_node_id())
        service = ActingService(self._bypass)
        self._grpc = MantaServicer(service)  # type: ignore[arg-type]
        self._health = HealthServicer(service.ready)

    Chat, ChatStream, Generate, GenerateStream = _Front.Chat, _Front.ChatStream, _Front.Generate, _Front.GenerateStream
    ListModels, GetModel = _Front.ListModels, _Front.GetModel
    Check, List, Watch = _Front.Check, _Front.List, _Front.Watch
