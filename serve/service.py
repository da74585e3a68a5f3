"""Steps 3 and 13 of a request: what was asked becomes one engine request per choice, and token events become text.

The one core under both fronts: HTTP and gRPC call only this.
"""

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.errors import EngineStopped
from engine.failpoints import hit
from engine.plan import TokenEvent
from engine.request_trace import trace_place
from serve.choice import Choice, ChoicePlan
from serve.collect import collected
from serve.embedding import Embedder, together
from serve.errors import ModelNotFound, from_event
from serve.limits import Limits
from serve.merge_streams import merged
from serve.model_facts import ModelFacts
from serve.prompt_logprobs import PromptScores, scores_of
from serve.request import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    EmbeddingResult,
    Result,
    TextEvent,
    TokenizeRequest,
    Usage,
)
from serve.request_observer import Observer, observe_events
from serve.request_preparer import Asked, Prompts
from serve.request_timing import EngineTimes, Stopwatch
from serve.stream_resume import caught_up, had_of, unsaid
from serve.structured.compiler import Compiles, GrammarCompilers
from serve.text.threads import beside_the_loop
from serve.text.tokenizer import Tokenizer
from serve.token_source import TokenSource, engine_request, must_be_in_time, next_event
from serve.tools.protocol import ProtocolName
from serve.tools.request_tools import Toolbox
from serve.validation import Validator

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
"""A token that a client has already takes about as long to say again."""


@dataclass(frozen=True, kw_only=True)
class _Yielded:
    """What one choice has given its client so far."""

    num_tokens: int = 0
    num_cached: int = 0
    finished: bool = False


class Service:
    """Offers one model."""

    def __init__(
        self,
        *,
        model: ModelFacts,
        tokenizer: Tokenizer,
        source: TokenSource,
        limits: Limits | None = None,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.time,
        compilers: Compiles | None = None,
        tool_protocol: ProtocolName = "auto",
        refusal: Callable[[str], TokenEvent | None] = lambda tenant: None,
        names: Sequence[str] = (),
    ) -> None:
        """``clock`` tells Unix time; ``compilers`` are by default processes that are started when first needed. ``refusal`` tells whether
        a tenant's requests are refused just now, which is asked before they are tokenized. ``names`` are those of all models of the
        server, to tell whoever asks for another (by default this one's).

        Raises:
            InvalidTokenizer: the model's chat template is damaged.
        """
        self._model, self._tokenizer, self._source, self._clock = model, tokenizer, source, clock
        self._observers, self._refusal = observers, refusal
        self.limits = limits or Limits()
        self._names = tuple(names) or (model.name,)
        self._validator = Validator(model=model, limits=self.limits, names=self._names)
        self._embedder = Embedder(model, tokenizer, source, self._validator, clock, self._must_find_room)
        self._compilers = compilers or GrammarCompilers(model.folder, self.limits)
        self._prompts = Prompts(
            model,
            tokenizer,
            self._validator,
            limits=self.limits,
            compilers=self._compilers,
            tool_protocol=tool_protocol,
            must_find_room=self._must_find_room,
        )

    def models(self) -> tuple[ModelFacts, ...]:
        """What this server offers."""
        return (self._model,)

    def model(self, name: str) -> ModelFacts:
        """
        Raises:
            ModelNotFound: it is not offered.
        """
        if name != self._model.name:
            raise ModelNotFound(name, self._names)
        return self._model

    def ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return self._source.ready()

    def readiness(self) -> Mapping[str, bool]:
        """The same for each model by its name."""
        return {self._model.name: self.ready()}

    async def warm_up(self) -> None:
        """Have ready what the first requests of some kinds would wait for: a compiler of grammars. Failing at it is only logged."""
        try:
            await self._compilers.warm_up()
        except Exception:
            logger.exception("no compiler of grammars for %s; the first request that needs one tries again", self._model.name)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        """The answer's events, all choices merged; the last event alone has ``usage``.

        Nothing is done before the first ``__anext__``. Whatever is wrong with the request, and a refusal for lack of room, is
        raised there, before any event: a front waits for the first event before it sends headers. ``aclose`` (or cancelling
        the task that waits in ``__anext__``) cancels every choice.

        Raises:
            ServeError, EngineError: see `serve.errors.WIRE`.
        """
        async with aclosing(observe_events(request, self._chat(request), self._observers)) as events:
            async for event in events:
                yield event

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        """As `chat`, for prompts without a template. Choice index = prompt index * n + choice."""
        async with aclosing(observe_events(request, self._complete(request), self._observers)) as events:
            async for event in events:
                yield event

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        """The whole answer at once. Raises as `chat`."""
        stream = self.chat(request) if isinstance(request, ChatRequest) else self.complete(request)
        return await collected(stream, request.request_id)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """A vector for each input. Raises as `chat`."""
        async with aclosing(observe_events(request, self._embedder.vectors(request), self._observers)) as events:
            return await together(request.request_id, events)

    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
        """The ids that the engine would get: of a text as a completion's prompt, of messages as a chat.

        Raises:
            ServeError: the model is not offered, or the input cannot be used.
        """
        self._validator.tokenize(request)
        text, encode = request.input, self._tokenizer.encode
        if not isinstance(text, str):
            chat = ChatRequest(request_id="", model=request.model, messages=text)
            return await self._prompts.of_messages(text, Toolbox.of(chat, self._prompts.tool_protocol, self.limits))
        return await beside_the_loop(len(text), lambda: encode(text, add_special_tokens=request.add_special_tokens))

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """The text of ``ids``, without control tokens.

        Raises:
            ServeError: the model is not offered, or has no such token.
        """
        self._validator.detokenize(model, ids)
        return await beside_the_loop(CHARS_PER_TOKEN * len(ids), lambda: self._tokenizer.decode(ids))

    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        """Each token by itself; bytes that are no character show as U+FFFD. Raises as `detokenize`."""
        self._validator.detokenize(model, ids)

        def texts() -> tuple[str, ...]:
            return tuple(self._tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids)

        return await beside_the_loop(CHARS_PER_TOKEN * len(ids), texts)

    async def _chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        stopwatch = Stopwatch(request.arrived_s)
        async with aclosing(self._answer(await self._prompts.of_chat(request, stopwatch))) as events:
            async for event in events:
                yield event

    async def _complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        stopwatch = Stopwatch(request.arrived_s)
        async with aclosing(self._answer(await self._prompts.of_completion(request, stopwatch))) as events:
            async for event in events:
                yield event

    def _must_find_room(self, request: ChatRequest | CompletionRequest | EmbeddingRequest) -> None:
        if (refused := self._refusal(request.caller.id)) is not None:
            raise from_event(refused)

    async def _answer(self, asked: Asked) -> AsyncGenerator[TextEvent, None]:
        must_be_in_time(asked.request.deadline_s, self._clock)
        trace_place(3, asked.request.request_id)
        asked.stopwatch.submitted()
        choices = self._choices(asked)
        told = False
        had = [had_of(asked.request, index) for index in range(len(choices))]
        yielded = [_Yielded(num_tokens=len(one.tokens), finished=one.finished) for one in had]
        running = [choice for choice, one in zip(choices, had, strict=True) if not one.finished]
        if not running:
            yield TextEvent(choice=0, usage=_usage(asked, yielded))
            return
        scores = scores_of(running)
        streams = [self._stream(asked, choice, scores.get(choice.plan.prompt_index)) for choice in running]
        async with aclosing(merged(streams)) as events:
            async for event, so_far in events:
                if not told:
                    told = True
                    trace_place(13, asked.request.request_id)
                yielded[event.choice] = so_far
                usage = _usage(asked, yielded)
                last = all(choice.finished for choice in yielded)
                event = event.with_usage_so_far(usage)
                yield _last(asked, event, usage) if last else event

    def _choices(self, asked: Asked) -> list[Choice]:
        options = asked.request.options
        num_each = options.n or 1
        return [
            Choice(
                plan=ChoicePlan(
                    index=index,
                    prompt_index=index // num_each,
                    stop=options.stop,
                    min_tokens=options.min_tokens or 0,
                    eos_ids=frozenset(() if options.ignore_eos else self._model.defaults.eos_token_ids),
                    echo=asked.echoes[index // num_each],
                    prompt=self._told_prompt(asked, index, index // num_each),
                ),
                tokenizer=self._tokenizer,
            )
            for index in range(len(asked.prompts) * num_each)
        ]

    def _told_prompt(self, asked: Asked, choice: int, prompt: int) -> tuple[int, ...]:
        """The prompt's tokens, if their log-probabilities are wanted and have not been told; they come with the first token."""
        wanted = asked.sampling[prompt].prompt_logprobs is not None and not had_of(asked.request, choice).tokens
        return asked.prompts[prompt] if wanted else ()

    async def _stream(self, asked: Asked, choice: Choice, scores: PromptScores | None) -> AsyncGenerator[tuple[TextEvent, _Yielded], None]:
        """One choice from the engine, cancelled there as soon as nobody wants more of it.

        Each event comes with the choice's counts at that event: the choice itself may be further by the time it is yielded.
        """
        at = choice.plan.prompt_index
        had, sampling = had_of(asked.request, choice.plan.index), asked.sampling[at]
        if scores is not None and scores.scorer != choice.plan.index:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        request = engine_request(asked.request, choice.plan.index, asked.prompts[at], sampling, committed=had.tokens)
        hit("service.begin")
        times, held_s = EngineTimes(), 0.0
        reading = asked.toolbox.reading(choice.plan.index) if asked.toolbox else None
        end = await beside_the_loop(CHARS_PER_TOKEN * len(had.tokens), lambda: caught_up(choice, reading, request.id, had))
        if end is not None:
            yield end, _Yielded(num_tokens=choice.num_tokens, finished=True)
            return
        async with aclosing(self._source.stream(request)) as stream, aclosing(_scored(stream, choice, scores)) as events:
            while (event := await next_event(events, request.deadline_s, self._clock)) is not None:
                times.take(event)
                held_s += event.held_s
                since_s = asked.stopwatch.now()
                text = choice.apply(event)
                text = reading.read(text) if reading and text is not None else text
                text = text and unsaid(text, choice, had)
                asked.stopwatch.detokenised(since_s)
                if text is not None:
                    if held_s:
                        text, held_s = dataclasses.replace(text, held_s=held_s), 0.0
                    text = dataclasses.replace(text, phase_times=times.at_end(event)) if choice.finished else text
                    yield text, _Yielded(num_tokens=choice.num_tokens, num_cached=choice.num_cached, finished=choice.finished)
                if choice.finished:
                    return
        raise EngineStopped("the tokens ended without an end")


def _scored(stream: AsyncGenerator[TokenEvent, None], choice: Choice, scores: PromptScores | None) -> AsyncGenerator[TokenEvent, None]:
    return scores.told_by(choice.plan.index, stream) if scores is not None and choice.plan.prompt else stream


def _last(asked: Asked, event: TextEvent, usage: Usage) -> TextEvent:
    ledger = None if event.phase_times is None else asked.stopwatch.ledger(event.phase_times)
    return dataclasses.replace(event, usage=usage, ledger=ledger)


def _usage(asked: Asked, choices: Sequence[_Yielded]) -> Usage:
    """Each prompt counts once, however many choices answer it; what of it was cached is what its first choice found."""
    num_each = len(choices) // len(asked.prompts)
    if len(choices) == 1:  # nearly every request, and this is done for every token
        return Usage(prompt_tokens=len(asked.prompts[0]), completion_tokens=choices[0].num_tokens, cached_tokens=choices[0].num_cached)
    return Usage(
        prompt_tokens=sum(map(len, asked.prompts)),
        completion_tokens=sum(choice.num_tokens for choice in choices),
        cached_tokens=sum(choice.num_cached for choice in choices[::num_each]),
    )
