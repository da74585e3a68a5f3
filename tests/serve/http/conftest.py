"""A scripted service behind the real HTTP API."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.plan import TokenLogprobs
from model.generation_config import GenerationDefaults
from serve.errors import ModelNotFound
from serve.http.app import create_app
from serve.limits import Limits
from serve.request import ChatRequest, ChoiceResult, CompletionRequest, Result, TextEvent, TextToken, Usage
from serve.request_timing import RequestTiming

MODEL = "Qwen/tiny"


@dataclass
class ScriptedService:
    """Answers every request with the same words, and remembers what it was asked."""

    words: Sequence[str] = ("Hello", " wor", "ld", "")
    finish_reason: str = "stop"
    failure: Exception | None = None
    """Raised before the word of index `fails_at`."""
    fails_at: int = 0
    forgets_the_end: bool = False
    waits_at: int | None = None
    """Index of the word before which it waits until cancelled."""
    is_ready: bool = True
    timing: RequestTiming | None = None
    asked: list[Any] = field(default_factory=list)
    num_open: int = 0
    num_closed_early: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._answer(request, request.options.n or 1)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._answer(request, (request.options.n or 1) * len(request.prompts))

    async def _answer(self, request: Any, choices: int) -> AsyncGenerator[TextEvent, None]:
        self.asked.append(request)
        self._check_model(request.model)
        self.num_open += 1
        ended = False
        try:
            for index, word in enumerate(self.words):
                if self.failure and index == self.fails_at:
                    raise self.failure
                if index == self.waits_at:
                    self.waiting.set()
                    await asyncio.Event().wait()
                last = index == len(self.words) - 1
                for choice in range(choices):
                    very_last = last and choice == choices - 1
                    if very_last and self.forgets_the_end:
                        return
                    ended = very_last
                    yield self._event(request, choice, index, word, last, very_last)
        finally:
            self.num_open -= 1
            self.num_closed_early += not ended

    def _event(self, request: Any, choice: int, index: int, word: str, last: bool, very_last: bool) -> TextEvent:
        return TextEvent(
            choice=choice,
            text=word,
            tokens=(self._token(index, word, request.options.logprobs),) if word else (),
            finish_reason=self.finish_reason if last else None,
            usage=self._usage(request) if very_last else None,
            timing=self.timing if very_last else None,
            usage_so_far=Usage(prompt_tokens=5, completion_tokens=index + 1),
        )

    def _token(self, index: int, word: str, logprobs: int | None) -> TextToken:
        if logprobs is None:
            return TextToken(id=index, text=word, raw=word.encode())
        top = tuple((index + rank, f"{word}{rank}", f"{word}{rank}".encode(), -1.0 - rank) for rank in range(logprobs))
        return TextToken(id=index, text=word, raw=word.encode(), logprobs=TokenLogprobs(logprob=-0.5), top=top)

    def _usage(self, request: Any) -> Usage:
        return Usage(prompt_tokens=5, completion_tokens=len(self.words) * (request.options.n or 1), cached_tokens=2)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        events = [event async for event in (self.chat(request) if isinstance(request, ChatRequest) else self.complete(request))]
        choices = {event.choice: [other for other in events if other.choice == event.choice] for event in events}
        return Result(
            request_id=request.request_id,
            choices=tuple(
                ChoiceResult(
                    choice=choice,
                    text="".join(event.text for event in own),
                    tokens=tuple(token for event in own for token in event.tokens),
                    finish_reason=own[-1].finish_reason or "",
                    stop_reason=own[-1].stop_reason,
                )
                for choice, own in choices.items()
            ),
            usage=events[-1].usage or self._usage(request),
            timing=self.timing,
        )

    def models(self) -> Any:
        made_of = {"root": MODEL, "parent": None}
        defaults = GenerationDefaults(top_p=0.8)
        return (SimpleNamespace(name=MODEL, created=1_700_000_000, max_context_tokens=2048, defaults=defaults, **made_of),)

    def model(self, name: str) -> Any:
        self._check_model(name)
        return self.models()[0]

    def _check_model(self, name: str) -> None:
        if name != MODEL:
            raise ModelNotFound(name)

    def ready(self) -> bool:
        return self.is_ready

    def readiness(self) -> dict[str, bool]:
        return {MODEL: self.is_ready}


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def app(service: ScriptedService, limits: Limits) -> Any:
    return create_app(lambda: service, limits)


@pytest.fixture
async def http(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
        yield client


@pytest.fixture
def chat_body() -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def completion_body() -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Once upon"}
