"""Place 2 of a request: a request that is sent again under its idempotency key is not computed again.

A client whose connection broke cannot know whether its request arrived. It sends it again under the same key, to the same front or
another one. If the front is still computing the request, the second call reads the same events from the first one on. If it has
finished it, the call gets the stored answer. If it does not know the key, it computes the request, and the seed makes the answer the
same. A call with `so_far` (see `serve.stream_resume`) takes the request over from an earlier call, whose connection is gone.
"""

import asyncio
import dataclasses
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from engine.errors import EngineStopped
from serve.caller import ANONYMOUS
from serve.collect import collect_result
from serve.errors import InvalidRequest, TakenOver
from serve.limits import Limits, is_identifier
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, EmbeddingResult, Result, SoFar, TextEvent
from serve.service_api import ServiceApi, ServiceWrapper

IDEMPOTENCY_KEY = "idempotency-key"
"""Header of HTTP, metadata of gRPC."""
MIN_ANSWERS_KEPT = 32
"""There is room for at least so many answers: none may have more than 1/32 of `Limits.remembered_tokens`."""
VECTOR_BYTES_PER_TOKEN = 512
"""So many bytes of a vector count as one token: a text token with its text and bytes takes about as much memory."""

RunKey = tuple[str, str]
"""The caller's id and the idempotency key, so that nobody reads the answers of others."""
Event = TextEvent | EmbeddingResult
"""All vectors of a request are one event."""


def parse_idempotency_key(value: str | None, limits: Limits) -> str:
    """The value of the header; "" if there is none.

    Raises:
        InvalidRequest: it is not an identifier.
    """
    if value is None:
        return ""
    if not is_identifier(value, limits):
        raise InvalidRequest(f"{IDEMPOTENCY_KEY} must be 1 to {limits.id_chars} of A-Z a-z 0-9 . _ : -", param=IDEMPOTENCY_KEY)
    return value


class IdempotentService(ServiceWrapper):
    """Wraps a service: calls with the same key share one computation."""

    def __init__(self, inner: ServiceApi, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(inner)
        self._clock = clock
        self._runs: dict[RunKey, _Run] = {}
        """Running, or finished and kept."""
        self._kept: OrderedDict[RunKey, float] = OrderedDict()
        """The finished ones by the time they ended (of ``clock``), oldest first."""
        self._kept_tokens = 0

    def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        return self._text(request) if request.idempotency_key else self._inner.chat(request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        return self._text(request) if request.idempotency_key else self._inner.complete(request)

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        if not request.idempotency_key:
            return await self._inner.collect(request)
        return await collect_result(self._text(request), request.request_id)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        if not request.idempotency_key:
            return await self._inner.embed(request)
        async with aclosing(self._read(request)) as events:
            async for event in events:
                assert isinstance(event, EmbeddingResult)
                return dataclasses.replace(event, request_id=request.request_id)
        raise EngineStopped("there are no vectors")

    @property
    def num_kept(self) -> int:
        """Number of finished answers that are kept."""
        return len(self._kept)

    async def _text(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        async with aclosing(self._read(request)) as events:
            async for event in events:
                assert isinstance(event, TextEvent)
                yield event

    async def _read(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        key = (request.caller.id, request.idempotency_key)
        run = await self._run(key, request)
        reader = _Reader()
        run.readers.add(reader)
        try:
            while (event := await run.event(reader)) is not None:
                yield event
        finally:
            run.readers.discard(reader)
            if not run.readers:
                await self._release(key, run)

    async def _run(self, key: RunKey, request: AnyRequest) -> "_Run":
        """The run to read: an existing or a new one.

        Raises:
            InvalidRequest: the key was used for another request.
        """
        self._forget_old()
        fingerprint, so_far = _fingerprint(request), () if isinstance(request, EmbeddingRequest) else request.so_far
        while (known := self._runs.get(key)) is not None and known.failure is None and not known.too_long:
            if known.fingerprint != fingerprint:
                raise InvalidRequest("this idempotency key was used for another request; take a new one", param=IDEMPOTENCY_KEY)
            if known.so_far == so_far:
                return known
            self._forget(key)
            await known.end(TakenOver())
        run = _Run(
            self._computed(request), fingerprint=fingerprint, so_far=so_far, most_tokens=self.limits.remembered_tokens // MIN_ANSWERS_KEPT
        )
        self._forget(key)
        self._runs[key] = run
        return run

    def _computed(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        match request:
            case ChatRequest():
                return self._inner.chat(request)
            case CompletionRequest():
                return self._inner.complete(request)
            case EmbeddingRequest():
                return self._vectors(request)

    async def _vectors(self, request: EmbeddingRequest) -> AsyncGenerator[Event, None]:
        yield await self._inner.embed(request)

    async def _release(self, key: RunKey, run: "_Run") -> None:
        """Called when nobody reads the run any more: keeps a complete answer, ends anything else."""
        is_current = self._runs.get(key) is run
        if run.over and run.failure is None and not run.too_long:
            if is_current and key not in self._kept:
                self._kept[key] = self._clock()
                self._kept_tokens += run.num_tokens
                self._forget_old()
            return
        if is_current:
            self._forget(key)
        await run.end()

    def _forget_old(self) -> None:
        since, room = self._clock() - self.limits.remembered_s, self.limits.remembered_tokens
        while self._kept:
            key, ended = next(iter(self._kept.items()))
            if ended >= since and self._kept_tokens <= room:
                break
            self._forget(key)

    def _forget(self, key: RunKey) -> None:
        run = self._runs.pop(key, None)
        if self._kept.pop(key, None) is not None and run is not None:
            self._kept_tokens -= run.num_tokens


class _Reader:
    """The position of one call in the events of a run."""

    def __init__(self) -> None:
        self.at = 0


class _Run:
    """One computation of an answer, with any number of readers. The reader that is furthest along pulls the next event for all."""

    def __init__(self, stream: AsyncGenerator[Event, None], *, fingerprint: bytes, so_far: tuple[SoFar, ...], most_tokens: int) -> None:
        self._stream, self.fingerprint, self.so_far, self._most_tokens = stream, fingerprint, so_far, most_tokens
        self.readers: set[_Reader] = set()
        self.failure: Exception | None = None
        self.over = False
        self.num_tokens = 0
        """Tokens in its events, including alternatives to tokens."""
        self._events: list[Event] = []
        self._num_dropped = 0
        """Number of events that were dropped from the beginning of the list."""
        self._pulling: asyncio.Task[None] | None = None

    @property
    def too_long(self) -> bool:
        """Whether it is too long to be kept, so that it can no longer be read from the beginning."""
        return self.num_tokens > self._most_tokens

    async def event(self, reader: _Reader) -> Event | None:
        """The reader's next event; None after the last.

        Raises:
            Exception: the error that ended the run.
        """
        while reader.at >= self._num_dropped + len(self._events):
            if self.failure is not None:
                raise self.failure
            if self.over:
                return None
            if self._pulling is None:
                self._pulling = asyncio.create_task(self._pull())
            await asyncio.wait([self._pulling])  # if this reader is cancelled here, the event still comes for the others
        event = self._events[reader.at - self._num_dropped]
        reader.at += 1
        if self.too_long:
            self._drop_read()
        return event

    async def end(self, failure: Exception | None = None) -> None:
        """Stop the computation if it is still running. Remaining readers get the failure."""
        self.failure, self.over = self.failure or failure, True
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.gather(self._pulling, return_exceptions=True)
        await self._stream.aclose()

    async def _pull(self) -> None:
        try:
            event = await anext(self._stream, None)
            if event is None:
                self.over = True
                return
            if event.usage is not None:  # the last one: a reader may close its call right after it
                self.over = await anext(self._stream, None) is None
            self._events.append(event)
            self.num_tokens += _size(event)
        except Exception as error:
            self.failure, self.over = self.failure or error, True
        finally:
            self._pulling = None

    def _drop_read(self) -> None:
        read = min((reader.at for reader in self.readers), default=0) - self._num_dropped
        del self._events[:read]
        self._num_dropped += read


def _size(event: Event) -> int:
    """The size of an event in tokens."""
    if isinstance(event, EmbeddingResult):
        return sum(-(-len(vector) // VECTOR_BYTES_PER_TOKEN) for vector in event.vectors)
    return sum(1 + len(token.top) for token in (*event.tokens, *event.prompt_tokens))


def _fingerprint(request: AnyRequest) -> bytes:
    """A digest of what stays the same when a client sends a request again."""
    same = dataclasses.replace(request, request_id="", deadline_s=None, arrived_s=None, caller=ANONYMOUS, trace={})
    if not isinstance(same, EmbeddingRequest):
        same = dataclasses.replace(same, so_far=())
    return hashlib.sha256(repr(same).encode(errors="replace")).digest()
