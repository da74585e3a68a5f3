"""Places 3 and 13 of a request for embeddings: inputs become token ids, and hidden states become vectors."""

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import numpy as np

from engine.errors import EngineStopped
from engine.request import Pooling, SamplingParams
from engine.request_trace import trace_place
from model.pooling import PoolingConfig
from serve.errors import error_from_event
from serve.merge_streams import merge_streams
from serve.model_facts import ModelFacts
from serve.request import EmbeddingRequest, EmbeddingResult, TextEvent, Usage
from serve.request_timing import EngineTimes, Stopwatch
from serve.text.threads import run_in_thread_if_long
from serve.text.tokenizer import Tokenizer
from serve.token_source import TokenSource, check_could_fit, check_deadline, engine_request, next_event
from serve.validation import Validator

MAX_CONCURRENT_INPUTS = 128
"""Of one request in the engine, so that no client fills its queue with a single call."""


class Embedder:
    """Computes embeddings with one model."""

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: Tokenizer,
        source: TokenSource,
        validator: Validator,
        clock: Callable[[], float],
        check_admission: Callable[[EmbeddingRequest], None],
    ) -> None:
        """``check_admission`` raises if the request is refused at the moment; called before it is tokenized."""
        self._model, self._tokenizer, self._source, self._validator, self._clock = model, tokenizer, source, validator, clock
        self._check_admission = check_admission

    async def vectors(self, request: EmbeddingRequest) -> AsyncGenerator[TextEvent, None]:
        """An event for each input, in order of completion; the last one has ``usage``."""
        stopwatch = Stopwatch(request.arrived_s)
        self._validator.embedding(request)
        self._check_admission(request)
        assert self._model.pooling is not None
        inputs = [await self._ids(one) for one in request.inputs]
        check_deadline(request.deadline_s, self._clock)
        trace_place(3, request.request_id)
        stopwatch.submitted()
        usage, done = Usage(prompt_tokens=0, completion_tokens=0), 0
        for begin in range(0, len(inputs), MAX_CONCURRENT_INPUTS):
            batch = list(enumerate(inputs))[begin : begin + MAX_CONCURRENT_INPUTS]
            streams = [self._vector(request, index, ids, self._model.pooling, stopwatch) for index, ids in batch]
            async with aclosing(merge_streams(streams)) as events:
                async for event, num_cached in events:
                    done += 1
                    usage = Usage(
                        prompt_tokens=usage.prompt_tokens + len(inputs[event.choice]),
                        completion_tokens=0,
                        cached_tokens=usage.cached_tokens + num_cached,
                    )
                    event = dataclasses.replace(event, usage_so_far=usage)
                    yield _with_totals(event, usage, stopwatch) if done == len(inputs) else event

    async def _ids(self, text: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(text, str):
            check_could_fit([text], self._tokenizer, self._model, param="input")
            ids = await run_in_thread_if_long(len(text), lambda: encode_input(text, self._tokenizer))
        else:
            ids = text
        self._validator.embedding_length(len(ids))
        return ids

    async def _vector(
        self, request: EmbeddingRequest, index: int, ids: tuple[int, ...], pooling: PoolingConfig, stopwatch: Stopwatch
    ) -> AsyncGenerator[tuple[TextEvent, int], None]:
        """The only event of one input, and how many of its tokens were cached."""
        engine_pooling = Pooling(kind=pooling.kind, is_causal=self._model.is_causal)
        input_request = dataclasses.replace(engine_request(request, index, ids, SamplingParams(max_tokens=0)), pooling=engine_pooling)
        times, held_s = EngineTimes(), 0.0
        async with aclosing(self._source.stream(input_request)) as stream:
            while (event := await next_event(stream, request.deadline_s, self._clock)) is not None:
                times.take(event)
                held_s += event.held_s
                if event.finish_reason in ("error", "cancelled"):
                    raise error_from_event(event)
                if event.embedding is not None:
                    since_s = stopwatch.now()
                    vector = finish_vector(event.embedding, pooling, request.dimensions)
                    stopwatch.detokenised(since_s)
                    trace_place(13, request.request_id)
                    done = TextEvent(choice=index, embedding=vector, finish_reason="stop", held_s=held_s, phase_times=times.at_end(event))
                    yield done, event.num_cached
                    return
        raise EngineStopped("the engine's stream ended before the embedding came")


async def collect_embeddings(request_id: str, events: AsyncIterator[TextEvent]) -> EmbeddingResult:
    """The result with the vectors of all inputs, in their order."""
    vectors: dict[int, bytes] = {}
    usage, timing, held_s = Usage(prompt_tokens=0, completion_tokens=0), None, 0.0
    async for event in events:
        assert event.embedding is not None
        vectors[event.choice] = event.embedding
        usage, timing, held_s = event.usage or usage, event.timing, max(held_s, event.held_s)
    ordered = tuple(vectors[index] for index in sorted(vectors))
    return EmbeddingResult(request_id=request_id, vectors=ordered, usage=usage, held_s=held_s, timing=timing)


def encode_input(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Like `Tokenizer.encode`, with the end of sequence appended if the model was trained so: its state is then the embedding."""
    ids, end = tokenizer.encode(text), tokenizer.appended_eos_id
    return ids if end is None or ids[-1:] == (end,) else (*ids, end)


def finish_vector(vector: bytes, pooling: PoolingConfig, dimensions: int | None) -> bytes:
    """The first ``dimensions`` numbers of ``vector`` (both float32, little-endian), normalised if the model's files say so.

    A shortened vector is always normalised, as OpenAI does: part of a vector of length 1 no longer has length 1.
    """
    numbers = np.frombuffer(vector, "<f4")[:dimensions].astype(np.float64)
    if pooling.normalise or dimensions is not None:
        numbers = numbers / max(float(np.linalg.norm(numbers)), float(np.finfo(np.float32).tiny))
    return numbers.astype("<f4").tobytes()


def _with_totals(event: TextEvent, usage: Usage, stopwatch: Stopwatch) -> TextEvent:
    timing = None if event.phase_times is None else stopwatch.timing(event.phase_times)
    return dataclasses.replace(event, usage=usage, timing=timing)
