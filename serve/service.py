"""Places 3 and 13 of a request: a client's request becomes one engine request per choice, and token events become text.

HTTP and gRPC share this core: they only translate to and from it. A request passes through

1. `RequestPreparer`: validation, chat template, tokens, sampling parameters, grammar;
2. `Service._answer`: one stream per choice, merged in order of arrival;
3. `Service._stream`: the engine's `TokenEvent`s of one choice become `TextEvent`s: detokenizer, stop strings, tool calls.
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
from serve.choice import Choice, ChoiceSettings
from serve.collect import collect_result
from serve.embedding import Embedder, collect_embeddings
from serve.errors import ModelNotFound, error_from_event
from serve.limits import Limits
from serve.merge_streams import merge_streams
from serve.model_facts import ModelFacts
from serve.prompt_logprobs import SharedPromptLogprobs, shared_prompt_logprobs
from serve.request import (
    AnyRequest,
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
from serve.request_preparer import PreparedRequest, RequestPreparer
from serve.request_timing import EngineTimes, Stopwatch
from serve.stream_resume import received_of, replay_received, without_received
from serve.structured.compiler import GrammarCompiler, GrammarCompilerPool
from serve.text.threads import run_in_thread_if_long
from serve.text.tokenizer import Tokenizer
from serve.token_source import TokenSource, check_deadline, engine_request, next_event
from serve.tools.protocol import ProtocolName
from serve.tools.request_tools import RequestTools
from serve.validation import Validator

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
"""Decoding a token takes about as long as encoding this many characters."""


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """What the client has been sent of one choice."""

    num_tokens: int = 0
    num_cached: int = 0
    finished: bool = False


class Service:
    """Serves one model."""

    def __init__(
        self,
        *,
        model: ModelFacts,
        tokenizer: Tokenizer,
        source: TokenSource,
        limits: Limits | None = None,
        observers: Sequence[Observer] = (),
        clock: Callable[[], float] = time.time,
        compiler: GrammarCompiler | None = None,
        tool_protocol: ProtocolName = "auto",
        refusal: Callable[[str], TokenEvent | None] = lambda tenant: None,
        names: Sequence[str] = (),
        requests_are_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            source: answers engine requests; in production the router over the model's replicas.
            clock: Unix time.
            compiler: compiles grammars; None: a pool of processes that are started when first needed.
            refusal: the error event for a tenant whose requests are refused at the moment, else None. Asked before a request is
                tokenized.
            names: of all models of the server, for the error about an unknown one; empty: this model's.
            requests_are_ended: see `observe_events`.

        Raises:
            InvalidTokenizer: the model's chat template is damaged.
        """
        self._model, self._tokenizer, self._source, self._clock = model, tokenizer, source, clock
        self._observers, self._requests_are_ended, self._refusal = observers, requests_are_ended, refusal
        self.limits = limits or Limits()
        self._names = tuple(names) or (model.name,)
        self._validator = Validator(model=model, limits=self.limits, names=self._names)
        self._embedder = Embedder(model, tokenizer, source, self._validator, clock, self._check_admission)
        self._compiler = compiler or GrammarCompilerPool(model.folder, self.limits)
        self._preparer = RequestPreparer(
            model,
            tokenizer,
            self._validator,
            limits=self.limits,
            compiler=self._compiler,
            tool_protocol=tool_protocol,
            check_admission=self._check_admission,
        )

    def models(self) -> tuple[ModelFacts, ...]:
        """The models that this service answers for: one."""
        return (self._model,)

    def model(self, name: str) -> ModelFacts:
        """The facts about the model of that name.

        Raises:
            ModelNotFound: it is not served here.
        """
        if name != self._model.name:
            raise ModelNotFound(name, self._names)
        return self._model

    def ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return self._source.ready()

    def readiness(self) -> Mapping[str, bool]:
        """`ready` by model name."""
        return {self._model.name: self.ready()}

    async def warm_up(self) -> None:
        """Start the grammar compiler, so that no request waits for it. A failure is only logged."""
        try:
            await self._compiler.warm_up()
        except Exception:
            logger.exception("no compiler of grammars for %s; the first request that needs one tries again", self._model.name)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        """The events of all choices, merged; only the last event has ``usage``.

        Nothing happens before the first ``__anext__``. An invalid request, or a refusal for lack of capacity, is raised there, before
        any event: a front waits for the first event before it sends headers. ``aclose``, or cancelling the task that waits in
        ``__anext__``, cancels every choice.

        Raises:
            ServeError, EngineError: see `serve.errors.ERROR_MAPPINGS`.
        """
        async with aclosing(self._observed(request, self._chat(request))) as events:
            async for event in events:
                yield event

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        """Like `chat`, for prompts without a template. Choice index = prompt index * n + choice."""
        async with aclosing(self._observed(request, self._complete(request))) as events:
            async for event in events:
                yield event

    async def collect(self, request: ChatRequest | CompletionRequest) -> Result:
        """The whole response of `chat` or `complete`. Raises as `chat`."""
        stream = self.chat(request) if isinstance(request, ChatRequest) else self.complete(request)
        return await collect_result(stream, request.request_id)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        """One vector for each input. Raises as `chat`."""
        async with aclosing(self._observed(request, self._embedder.vectors(request))) as events:
            return await collect_embeddings(request.request_id, events)

    async def tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
        """The ids that the engine would get: for text as a completion's prompt, for messages as a chat.

        Raises:
            ServeError: the model is not served here, or the input is invalid.
        """
        self._validator.tokenize(request)
        text, encode = request.input, self._tokenizer.encode
        if not isinstance(text, str):
            chat = ChatRequest(request_id="", model=request.model, messages=text)
            return await self._preparer.encode_messages(text, RequestTools.of(chat, self._preparer.tool_protocol, self.limits))
        return await run_in_thread_if_long(len(text), lambda: encode(text, add_special_tokens=request.add_special_tokens))

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        """The text of ``ids``, without control tokens.

        Raises:
            ServeError: the model is not served here, or has no such token.
        """
        self._validator.detokenize(model, ids)
        return await run_in_thread_if_long(CHARS_PER_TOKEN * len(ids), lambda: self._tokenizer.decode(ids))

    async def token_texts(self, model: str, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token alone; bytes that are not a whole character become U+FFFD. Raises as `detokenize`."""
        self._validator.detokenize(model, ids)

        def texts() -> tuple[str, ...]:
            return tuple(self._tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids)

        return await run_in_thread_if_long(CHARS_PER_TOKEN * len(ids), texts)

    def _observed(self, request: AnyRequest, events: AsyncGenerator[TextEvent, None]) -> AsyncGenerator[TextEvent, None]:
        return observe_events(request, events, self._observers, requests_are_ended=self._requests_are_ended)

    async def _chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        stopwatch = Stopwatch(request.arrived_s)
        async with aclosing(self._answer(await self._preparer.prepare_chat(request, stopwatch))) as events:
            async for event in events:
                yield event

    async def _complete(self, request: CompletionRequest) -> AsyncGenerator[TextEvent, None]:
        stopwatch = Stopwatch(request.arrived_s)
        async with aclosing(self._answer(await self._preparer.prepare_completion(request, stopwatch))) as events:
            async for event in events:
                yield event

    def _check_admission(self, request: ChatRequest | CompletionRequest | EmbeddingRequest) -> None:
        """Raise if the tenant's requests are refused at the moment.

        Raises:
            EngineError: the tenant's requests are refused at the moment.
        """
        if (refused := self._refusal(request.caller.id)) is not None:
            raise error_from_event(refused)

    async def _answer(self, prepared: PreparedRequest) -> AsyncGenerator[TextEvent, None]:
        """The events of all choices that are not finished yet, with usage and timing in the last one."""
        request = prepared.request
        check_deadline(request.deadline_s, self._clock)
        trace_place(3, request.request_id)
        prepared.stopwatch.submitted()
        choices = self._choices(prepared)
        received = [received_of(request, index) for index in range(len(choices))]
        sent = [_Sent(num_tokens=len(one.tokens), finished=one.finished) for one in received]
        running = [choice for choice, one in zip(choices, received, strict=True) if not one.finished]
        if not running:
            yield TextEvent(choice=0, usage=_usage(prepared, sent))
            return
        prompt_logprobs = shared_prompt_logprobs(running)
        streams = [self._stream(prepared, choice, prompt_logprobs.get(choice.settings.prompt_index)) for choice in running]
        is_first = True
        async with aclosing(merge_streams(streams)) as events:
            async for event, sent_of_choice in events:
                if is_first:
                    is_first = False
                    trace_place(13, request.request_id)
                sent[event.choice] = sent_of_choice
                usage = _usage(prepared, sent)
                is_last = all(choice.finished for choice in sent)
                event = event.with_usage_so_far(usage)
                yield _with_totals(prepared, event, usage) if is_last else event

    def _choices(self, prepared: PreparedRequest) -> list[Choice]:
        """Of every prompt in turn, `n` choices."""
        options = prepared.request.options
        num_each = options.n or 1
        return [
            Choice(
                settings=ChoiceSettings(
                    index=index,
                    prompt_index=index // num_each,
                    stop=options.stop,
                    min_tokens=options.min_tokens or 0,
                    eos_ids=frozenset(() if options.ignore_eos else self._model.defaults.eos_token_ids),
                    echo=prepared.echoes[index // num_each],
                    prompt=self._prompt_to_report(prepared, index, index // num_each),
                ),
                tokenizer=self._tokenizer,
            )
            for index in range(len(prepared.prompts) * num_each)
        ]

    def _prompt_to_report(self, prepared: PreparedRequest, choice: int, prompt: int) -> tuple[int, ...]:
        """The prompt's tokens if their log-probabilities are wanted. The first token brings them, so a client that has it has them too."""
        wanted = prepared.sampling[prompt].prompt_logprobs is not None and not received_of(prepared.request, choice).tokens
        return prepared.prompts[prompt] if wanted else ()

    async def _stream(
        self, prepared: PreparedRequest, choice: Choice, prompt_logprobs: SharedPromptLogprobs | None
    ) -> AsyncGenerator[tuple[TextEvent, _Sent], None]:
        """The events of one choice, which is cancelled in the engine as soon as nobody reads on.

        Each event comes with the choice's counts at that event, because the choice may be further along when it is yielded.
        """
        index, prompt = choice.settings.index, choice.settings.prompt_index
        received, sampling = received_of(prepared.request, index), prepared.sampling[prompt]
        if prompt_logprobs is not None and prompt_logprobs.scoring_choice != index:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        request = engine_request(prepared.request, index, prepared.prompts[prompt], sampling, committed=received.tokens)
        hit("service.begin")
        parser = prepared.tools.parser_for(index) if prepared.tools else None
        end = await run_in_thread_if_long(
            CHARS_PER_TOKEN * len(received.tokens), lambda: replay_received(choice, parser, request.id, received)
        )
        if end is not None:
            yield end, _Sent(num_tokens=choice.num_tokens, finished=True)
            return
        times, held_s = EngineTimes(), 0.0
        async with aclosing(self._source.stream(request)) as stream, aclosing(_attach(prompt_logprobs, choice, stream)) as events:
            while (event := await next_event(events, request.deadline_s, self._clock)) is not None:
                times.take(event)
                held_s += event.held_s
                started_s = prepared.stopwatch.now()
                text_event = choice.apply(event)
                if parser and text_event is not None:
                    text_event = parser.read(text_event)
                if text_event is not None:
                    text_event = without_received(text_event, choice, received)
                prepared.stopwatch.detokenised(started_s)
                if text_event is not None:
                    if held_s:
                        text_event, held_s = dataclasses.replace(text_event, held_s=held_s), 0.0
                    if choice.finished:
                        text_event = dataclasses.replace(text_event, phase_times=times.at_end(event))
                    yield text_event, _Sent(num_tokens=choice.num_tokens, num_cached=choice.num_cached, finished=choice.finished)
                if choice.finished:
                    return
        raise EngineStopped("the engine's stream ended before the choice did")


def _attach(
    prompt_logprobs: SharedPromptLogprobs | None, choice: Choice, stream: AsyncGenerator[TokenEvent, None]
) -> AsyncGenerator[TokenEvent, None]:
    """The stream with the prompt's log-probabilities in its first event, if this choice reports them."""
    if prompt_logprobs is None or not choice.settings.prompt:
        return stream
    return prompt_logprobs.attach_to(choice.settings.index, stream)


def _with_totals(prepared: PreparedRequest, event: TextEvent, usage: Usage) -> TextEvent:
    timing = None if event.phase_times is None else prepared.stopwatch.timing(event.phase_times)
    return dataclasses.replace(event, usage=usage, timing=timing)


def _usage(prepared: PreparedRequest, sent: Sequence[_Sent]) -> Usage:
    """Counts each prompt once, however many choices answer it; its cached tokens are those that its first choice found."""
    num_each = len(sent) // len(prepared.prompts)
    if len(sent) == 1:  # nearly every request, and this runs for every token
        return Usage(prompt_tokens=len(prepared.prompts[0]), completion_tokens=sent[0].num_tokens, cached_tokens=sent[0].num_cached)
    return Usage(
        prompt_tokens=sum(map(len, prepared.prompts)),
        completion_tokens=sum(choice.num_tokens for choice in sent),
        cached_tokens=sum(choice.num_cached for choice in sent[::num_each]),
    )
