"""Step 2 of a request: one that is sent again under its idempotency key is not computed again.

A client whose connection broke cannot know whether its request arrived. It sends it again under the same key, to the same
front or another. A front that has such a request under way lets the second call read along, from the first event; one that
has its answer gives that; one that knows nothing computes it, and its seed makes it the same. A call that has `so_far`
(see `serve.stream_resume`) takes its request over from an earlier call, which only waits for a connection that is gone.
"""

import asyncio
import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from engine.errors import EngineStopped
from serve.caller import ANYONE
from serve.collect import collected
from serve.errors import InvalidRequest, TakenOver
from serve.limits import Limits, is_identifier
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, SoFar, TextEvent
from serve.service_api import Offers, Passing

KEY = "idempotency-key"
"""Header of HTTP, metadata of gRPC."""
LARGEST_PART = 32
"""Of all that is remembered, one answer may be one part of so many."""
BYTES_AS_TOKEN = 512
"""Of a vector: they are remembered as one token of text is, which with its text and its bytes takes about as much."""

Name = tuple[str, str]
"""The caller's id and the key: nobody reads another's answers."""
Event = TextEvent | EmbeddingResult
"""Vectors come all at once."""


def key_of(said: str | None, limits: Limits) -> str:
    """ "" where the client says none.

    Raises:
        InvalidRequest: it is no identifier.
    """
    if said is None:
        return ""
    if not is_identifier(said, limits):
        raise InvalidRequest(f"{KEY} must be 1 to {limits.id_chars} of A-Z a-z 0-9 . _ : -", param=KEY)
    return said


class OncePerKey(Passing):
    """Before the service: answers requests of one key together."""

    def __init__(self, inside: Offers, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(inside)
        self._clock = clock
        self._runs: dict[Name, _Run] = {}
        """Under way, or kept."""
        self._kept: OrderedDict[Name, float] = OrderedDict()
        """Those that ended, oldest first, and when they did."""
        self._kept_tokens = 0

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._text(request) if request.idempotency_key else self._inside.chat(request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._text(request) if request.idempotency_key else self._inside.complete(request)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        if not request.idempotency_key:
            return await self._inside.collect(request)
        return await collected(self._text(request), request.request_id)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        if not request.idempotency_key:
            return await self._inside.embed(request)
        async with aclosing(self._read(request)) as events:
            async for event in events:
                assert isinstance(event, EmbeddingResult)
                return dataclasses.replace(event, request_id=request.request_id)
        raise EngineStopped("there are no vectors")

    @property
    def num_kept(self) -> int:
        """Answers that are remembered."""
        return len(self._kept)

    async def _text(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        async with aclosing(self._read(request)) as events:
            async for event in events:
                assert isinstance(event, TextEvent)
                yield event

    async def _read(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        name = (request.caller.id, request.idempotency_key)
        run = await self._run(name, request)
        reader = _Reader()
        run.readers.add(reader)
        try:
            while (event := await run.event(reader)) is not None:
                yield event
        finally:
            run.readers.discard(reader)
            if not run.readers:
                await self._leave(name, run)

    async def _run(self, name: Name, request: AnyRequest) -> "_Run":
        """The computation to read: one that is there, or a new one.

        Raises:
            InvalidRequest: the key was used for another request.
        """
        self._forget_old()
        asked, so_far = _fingerprint(request), () if isinstance(request, EmbeddingRequest) else request.so_far
        while (known := self._runs.get(name)) is not None and known.failure is None and not known.too_long:
            if known.asked != asked:
                raise InvalidRequest("this idempotency key was used for another request; take a new one", param=KEY)
            if known.so_far == so_far:
                return known
            self._forget(name)
            await known.end(TakenOver())
        run = _Run(self._computed(request), asked=asked, so_far=so_far, most_tokens=self.limits.remembered_tokens // LARGEST_PART)
        self._forget(name)
        self._runs[name] = run
        return run

    def _computed(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        match request:
            case ChatRequest():
                return self._inside.chat(request)
            case CompletionRequest():
                return self._inside.complete(request)
            case EmbeddingRequest():
                return self._vectors(request)

    async def _vectors(self, request: EmbeddingRequest) -> AsyncGenerator[Event, None]:
        yield await self._inside.embed(request)

    async def _leave(self, name: Name, run: "_Run") -> None:
        """Nobody reads it any more: an answer that is whole is kept, all else ended."""
        mine = self._runs.get(name) is run
        if run.over and run.failure is None and not run.too_long:
            if mine and name not in self._kept:
                self._kept[name] = self._clock()
                self._kept_tokens += run.num_tokens
                self._forget_old()
            return
        if mine:
            self._forget(name)
        await run.end()

    def _forget_old(self) -> None:
        since, room = self._clock() - self.limits.remembered_s, self.limits.remembered_tokens
        while self._kept:
            name, ended = next(iter(self._kept.items()))
            if ended >= since and self._kept_tokens <= room:
                break
            self._forget(name)

    def _forget(self, name: Name) -> None:
        run = self._runs.pop(name, None)
        if self._kept.pop(name, None) is not None and run is not None:
            self._kept_tokens -= run.num_tokens


class _Reader:
    """Where one call is in the events of a run."""

    def __init__(self) -> None:
        self.at = 0


class _Run:
    """One computation of an answer, for any number of readers. Whoever is furthest draws the next event, for all."""

    def __init__(self, stream: AsyncGenerator[Event, None], *, asked: bytes, so_far: tuple[SoFar, ...], most_tokens: int) -> None:
        self._stream, self.asked, self.so_far, self._most_tokens = stream, asked, so_far, most_tokens
        self.readers: set[_Reader] = set()
        self.failure: Exception | None = None
        self.over = False
        self.num_tokens = 0
        """What its events hold, alternatives to tokens included."""
        self._events: list[Event] = []
        self._num_dropped = 0
        """Events before those of the list."""
        self._drawing: asyncio.Task[None] | None = None

    @property
    def too_long(self) -> bool:
        """It cannot be read from its beginning."""
        return self.num_tokens > self._most_tokens

    async def event(self, reader: _Reader) -> Event | None:
        """The reader's next; None after the last.

        Raises:
            Exception: what ended the run.
        """
        while reader.at >= self._num_dropped + len(self._events):
            if self.failure is not None:
                raise self.failure
            if self.over:
                return None
            if self._drawing is None:
                self._drawing = asyncio.create_task(self._draw())
            await asyncio.wait([self._drawing])  # a reader that is cancelled here leaves the others what comes
        event = self._events[reader.at - self._num_dropped]
        reader.at += 1
        if self.too_long:
            self._drop_read()
        return event

    async def end(self, failure: Exception | None = None) -> None:
        """Stop the work, if it goes on; readers that are left get the failure."""
        self.failure, self.over = self.failure or failure, True
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
        await self._stream.aclose()

    async def _draw(self) -> None:
        try:
            event = await anext(self._stream, None)
            if event is None:
                self.over = True
                return
            if event.usage is not None:  # the last: whoever has it may leave at once
                self.over = await anext(self._stream, None) is None
            self._events.append(event)
            self.num_tokens += _size(event)
        except Exception as error:
            self.failure, self.over = self.failure or error, True
        finally:
            self._drawing = None

    def _drop_read(self) -> None:
        read = min((reader.at for reader in self.readers), default=0) - self._num_dropped
        del self._events[:read]
        self._num_dropped += read


def _size(event: Event) -> int:
    """In tokens."""
    if isinstance(event, EmbeddingResult):
        return sum(-(-len(vector) // BYTES_AS_TOKEN) for vector in event.vectors)
    return sum(1 + len(token.top) for token in (*event.tokens, *event.prompt_tokens))


def _fingerprint(request: AnyRequest) -> bytes:
    """What is the same when a client sends a request again."""
    same = dataclasses.replace(request, request_id="", deadline_s=None, arrived_s=None, caller=ANYONE, trace={})
    if not isinstance(same, EmbeddingRequest):
        same = dataclasses.replace(same, so_far=())
    return hashlib.sha256(repr(same).encode(errors="replace")).digest()
