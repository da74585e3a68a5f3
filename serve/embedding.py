"""Steps 3 and 13 of a request for embeddings: what a client sent becomes token ids, and hidden states become its vectors."""

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import numpy as np

from engine.errors import EngineStopped
from engine.request import Pooling, SamplingParams
from engine.request_trace import trace_place
from model.pooling import PoolingConfig
from serve.errors import from_event
from serve.merge_streams import merged
from serve.model_facts import ModelFacts
from serve.request import EmbeddingRequest, EmbeddingResult, TextEvent, Usage
from serve.request_timing import EngineTimes, Stopwatch
from serve.text.threads import beside_the_loop
from serve.text.tokenizer import Tokenizer
from serve.token_source import TokenSource, engine_request, may_fit, must_be_in_time, next_event
from serve.validation import Validator

INPUTS_AT_ONCE = 128
"""Of one request in the engine: no client takes all places of its queue with a single call."""


class Embedder:
    """Makes the vectors of one model."""

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: Tokenizer,
        source: TokenSource,
        validator: Validator,
        clock: Callable[[], float],
        must_find_room: Callable[[EmbeddingRequest], None],
    ) -> None:
        """``must_find_room`` raises where a request is refused whatever it asks for, before it is tokenized."""
        self._model, self._tokenizer, self._source, self._validator, self._clock = model, tokenizer, source, validator, clock
        self._must_find_room = must_find_room

    async def vectors(self, request: EmbeddingRequest) -> AsyncGenerator[TextEvent, None]:
        """An event for each input, as they are finished; the last one has ``usage``."""
        stopwatch = Stopwatch(request.arrived_s)
        self._validator.embedding(request)
        self._must_find_room(request)
        assert self._model.pooling is not None
        inputs = [await self._ids(one) for one in request.inputs]
        must_be_in_time(request.deadline_s, self._clock)
        trace_place(3, request.request_id)
        stopwatch.submitted()
        usage, done = Usage(prompt_tokens=0, completion_tokens=0), 0
        for begin in range(0, len(inputs), INPUTS_AT_ONCE):
            some = list(enumerate(inputs))[begin : begin + INPUTS_AT_ONCE]
            streams = [self._vector(request, index, ids, self._model.pooling, stopwatch) for index, ids in some]
            async with aclosing(merged(streams)) as events:
                async for event, num_cached in events:
                    done += 1
                    usage = Usage(
                        prompt_tokens=usage.prompt_tokens + len(inputs[event.choice]),
                        completion_tokens=0,
                        cached_tokens=usage.cached_tokens + num_cached,
                    )
                    event = dataclasses.replace(event, usage_so_far=usage)
                    yield _last(event, usage, stopwatch) if done == len(inputs) else event

    async def _ids(self, text: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(text, str):
            may_fit([text], self._tokenizer, self._model, param="input")
            ids = await beside_the_loop(len(text), lambda: ids_of(text, self._tokenizer))
        else:
            ids = text
        self._validator.embedding_length(len(ids))
        return ids

    async def _vector(
        self, request: EmbeddingRequest, index: int, ids: tuple[int, ...], pooling: PoolingConfig, stopwatch: Stopwatch
    ) -> AsyncGenerator[tuple[TextEvent, int], None]:
        """One input's only event, and how many of its tokens were cached."""
        wanted = Pooling(kind=pooling.kind, is_causal=self._model.is_causal)
        asked = dataclasses.replace(engine_request(request, index, ids, SamplingParams(max_tokens=0)), pooling=wanted)
        times, held_s = EngineTimes(), 0.0
        async with aclosing(self._source.stream(asked)) as stream:
            while (event := await next_event(stream, request.deadline_s, self._clock)) is not None:
                times.take(event)
                held_s += event.held_s
                if event.finish_reason in ("error", "cancelled"):
                    raise from_event(event)
                if event.embedding is not None:
                    since_s = stopwatch.now()
                    vector = finished(event.embedding, pooling, request.dimensions)
                    stopwatch.detokenised(since_s)
                    trace_place(13, request.request_id)
                    told = TextEvent(choice=index, embedding=vector, finish_reason="stop", held_s=held_s, phase_times=times.at_end(event))
                    yield told, event.num_cached
                    return
        raise EngineStopped("an input has got no embedding")


async def together(request_id: str, events: AsyncIterator[TextEvent]) -> EmbeddingResult:
    """The vectors of all inputs, in their order."""
    vectors: dict[int, bytes] = {}
    usage, ledger, held_s = Usage(prompt_tokens=0, completion_tokens=0), None, 0.0
    async for event in events:
        assert event.embedding is not None
        vectors[event.choice] = event.embedding
        usage, ledger, held_s = event.usage or usage, event.ledger, max(held_s, event.held_s)
    ordered = tuple(vectors[index] for index in sorted(vectors))
    return EmbeddingResult(request_id=request_id, vectors=ordered, usage=usage, held_s=held_s, ledger=ledger)


def ids_of(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """As `Tokenizer.encode`, and behind it the end of sequence where the model was trained so: it is then whose state counts."""
    ids, end = tokenizer.encode(text), tokenizer.appended_eos_id
    return ids if end is None or ids[-1:] == (end,) else (*ids, end)


def finished(vector: bytes, pooling: PoolingConfig, dimensions: int | None) -> bytes:
    """float32, little-endian: of ``vector`` the first so many numbers, scaled to length 1 if the model's own files say so.

    Fewer dimensions are scaled anyway, as OpenAI does: what is left of a vector of length 1 is none.
    """
    numbers = np.frombuffer(vector, "<f4")[:dimensions].astype(np.float64)
    if pooling.normalise or dimensions is not None:
        numbers = numbers / max(float(np.linalg.norm(numbers)), float(np.finfo(np.float32).tiny))
    return numbers.astype("<f4").tobytes()


def _last(event: TextEvent, usage: Usage, stopwatch: Stopwatch) -> TextEvent:
    ledger = None if event.phase_times is None else stopwatch.ledger(event.phase_times)
    return dataclasses.replace(event, usage=usage, ledger=ledger)
