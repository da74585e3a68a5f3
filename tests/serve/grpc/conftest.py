"""A service that answers by script, behind the real servicer on a real gRPC server at a loopback port."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from engine.plan import TokenLogprobs
from serve.errors import ModelNotFound
from serve.grpc.generated import service_pb2_grpc
from serve.grpc.server import start_server
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, ChoiceResult, CompletionRequest, Result, TextEvent, TextToken, Usage

FACTS = ModelFacts(
    name="tiny", folder=Path("nowhere"), max_context_tokens=64, vocab_size=32, num_real_tokens=30, defaults=None, created=1_700_000_000
)
USAGE = Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=2)


def token(token_id: int, text: str) -> TextToken:
    raw = text.encode()
    return TextToken(id=token_id, text=text, raw=raw, logprobs=TokenLogprobs(-0.5), top=((token_id, text, raw, -0.5), (9, "x", b"x", -2.0)))


def answer(choice: int = 0, *, stop_reason: str | int | None = None) -> list[TextEvent]:
    """ "Hé!", whose é comes over two tokens, and its end."""
    half, rest = TextToken(id=2, text="\ufffd", raw=b"\xc3"), TextToken(id=3, text="\ufffd", raw=b"\xa9")
    return [
        TextEvent(choice=choice, text="H", tokens=(token(1, "H"),)),
        TextEvent(choice=choice, text="é", tokens=(half, rest)),
        TextEvent(choice=choice, text="!", finish_reason="stop", stop_reason=stop_reason),
    ]


class ScriptedService:
    """What the servicer needs of `serve.service.Service`."""

    def __init__(self) -> None:
        self.events: list[TextEvent] = [*answer(), TextEvent(choice=0, usage=USAGE)]
        self.fails_at: int | None = None
        """Number of the event to raise `error` instead of."""
        self.error: Exception = RuntimeError("secret of the house: /etc/manta/key")
        self.holds_at: int | None = None
        """Number of the event to wait before, for ever."""
        self.asked: list[ChatRequest | CompletionRequest] = []
        self.holding, self.closed = asyncio.Event(), asyncio.Event()
        self.is_ready = True
        self.limits = Limits()

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._events(request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._events(request)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        events = [event async for event in self._events(request)]
        text = "".join(event.text for event in events)
        tokens = tuple(token for event in events for token in event.tokens)
        choice = ChoiceResult(choice=0, text=text, tokens=tokens, finish_reason="stop", stop_reason=events[-2].stop_reason)
        return Result(request_id=request.request_id, choices=(choice,), usage=USAGE)

    def models(self) -> tuple[ModelFacts, ...]:
        return (FACTS,)

    def model(self, name: str) -> ModelFacts:
        if name != FACTS.name:
            raise ModelNotFound(name)
        return FACTS

    def ready(self) -> bool:
        return self.is_ready

    def readiness(self) -> dict[str, bool]:
        return {FACTS.name: self.is_ready}

    async def _events(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        self.asked.append(request)
        try:
            for number, event in enumerate(self.events):
                if number == self.fails_at:
                    raise self.error
                if number == self.holds_at:
                    self.holding.set()
                    await asyncio.Event().wait()
                yield event
        finally:
            self.closed.set()


@pytest.fixture
async def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
async def channel(service: ScriptedService) -> AsyncIterator[grpc.aio.Channel]:
    server, port = await start_server(service, "127.0.0.1:0")  # type: ignore[arg-type]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(grace=None)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> service_pb2_grpc.MantaServiceStub:
    return service_pb2_grpc.MantaServiceStub(channel)
