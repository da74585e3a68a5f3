"""Step 3 of a request: judge what a client asked, for both fronts alike, and resolve what it left open.

Messages say what would be right and never repeat what was sent.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.request import SamplingParams
from serve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NotSupported
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, Message, Options, SoFar, TokenizeRequest
from serve.stream_resume import check_so_far
from serve.tools.validation import check_conversation, check_tools

N = TypeVar("N", int, float)

ROLES = ("system", "user", "assistant", "tool")
COMPLETION_MAX_TOKENS = 16
"""``max_tokens`` of a completion that does not say (OpenAI's API reference). A chat's is the rest of the context."""
NON_NEGATIVE_INT64 = (1 << 63) - 1
IDENTIFIER = re.compile(r"[A-Za-z0-9._:-]+")


@dataclass(frozen=True, kw_only=True)
class Validator:
    """The judge of all requests for one model. Every method raises `InvalidRequest` or a subclass, naming the field."""

    model: ModelFacts
    limits: Limits
    names: Sequence[str] = ()
    """Of all models of the server."""

    def chat(self, request: ChatRequest) -> None:
        """Everything that can be said before the messages are tokens."""
        self._common(request)
        self._answers()
        self._messages(request.messages)
        check_tools(request, self.limits)
        self._options(request.options, logprobs_param="top_logprobs", least_tokens=1)
        self._so_far(request.so_far, num_choices=request.options.n or 1)

    def completion(self, request: CompletionRequest) -> None:
        """Everything that can be said before the prompts are tokens."""
        self._common(request)
        self._answers()
        _counted("prompt", request.prompts, 1, self.limits.prompts)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                _text("prompt", prompt)
            else:
                self._prompt_ids(prompt)
        self._options(request.options, logprobs_param="logprobs", least_tokens=0)
        if len(request.prompts) * (request.options.n or 1) > self.limits.total_choices:
            raise InvalidRequest(f"prompts times n must be at most {self.limits.total_choices}", param="n")
        if request.options.max_tokens == 0 and not request.echo:
            raise InvalidRequest("max_tokens must be at least 1, or 0 with echo, where the prompt alone is wanted", param="max_tokens")
        self._so_far(request.so_far, num_choices=len(request.prompts) * (request.options.n or 1))

    def prompt_logprobs(self, request: CompletionRequest, num_prompt_tokens: int) -> int | None:
        """How many alternatives are wanted at each place of the prompts, which have so many tokens together; None: nothing is."""
        top, limit = request.options.logprobs, self.limits.prompt_logprobs
        if not request.echo or top is None:
            return None
        wanted = num_prompt_tokens * (request.options.n or 1) * (1 + top)
        if wanted > limit:
            raise InvalidRequest(
                f"echo with logprobs={top} gives {wanted} log-probabilities of the prompts, and at most {limit} are told at once; "
                "send fewer or shorter prompts, or ask for fewer alternatives",
                param="logprobs",
            )
        return top

    def embedding(self, request: EmbeddingRequest) -> None:
        """Everything that can be said before the inputs are tokens."""
        self._common(request)
        if self.model.pooling is None:
            raise NotSupported(
                "this model gives no embeddings: its files name no pooling; a server that is started with --set model.pooling=last does",
                param="model",
            )
        _counted("input", request.inputs, 1, self.limits.embedding_inputs)
        for one in request.inputs:
            if isinstance(one, str):
                _text("input", one)
            else:
                self._prompt_ids(one, param="input", room=0)
        _whole("dimensions", request.dimensions, 1, self.model.width)

    def embedding_length(self, num_tokens: int) -> None:
        limit = self.model.max_context_tokens
        if num_tokens < 1:
            raise InvalidRequest("input must hold at least one token each", param="input")
        if num_tokens > limit:
            raise ContextLengthExceeded(prompt_tokens=num_tokens, max_tokens=0, limit_tokens=limit, param="input")

    def tokenize(self, request: TokenizeRequest) -> None:
        self._offered(request.model)
        if isinstance(request.input, str):
            _text("prompt", request.input)
        else:
            self._messages(request.input)

    def detokenize(self, model: str, ids: Sequence[int]) -> None:
        self._offered(model)
        for token in ids:
            self._token_id("tokens", token)

    def sampling(self, options: Options, *, num_prompt_tokens: int, param: str, max_tokens: int | None, seed: int) -> SamplingParams:
        """Resolved parameters of checked ``options``; what neither client nor model says is off.

        ``param`` names the prompt's field, ``max_tokens`` is for a client that does not say (None: the rest of the context),
        ``seed`` likewise.
        """
        defaults = self.model.defaults
        stop_ids = () if options.ignore_eos else defaults.eos_token_ids
        top_k = _first(options.top_k, defaults.top_k, 0)
        return SamplingParams(
            repetition_penalty=float(_first(options.repetition_penalty, defaults.repetition_penalty or None, 1.0)),
            presence_penalty=float(_first(options.presence_penalty, None, 0.0)),
            frequency_penalty=float(_first(options.frequency_penalty, None, 0.0)),
            logit_bias=tuple((token, float(bias)) for token, bias in options.logit_bias),
            temperature=float(_first(options.temperature, defaults.temperature, 1.0)),
            top_k=top_k if 0 < top_k < self.model.num_real_tokens else 0,
            top_p=float(_first(options.top_p, defaults.top_p or None, 1.0)),
            min_p=float(_first(options.min_p, None, 0.0)),
            seed=(seed if options.seed is None else options.seed) & NON_NEGATIVE_INT64,
            max_tokens=self._max_tokens(options, num_prompt_tokens, param, max_tokens),
            min_tokens=options.min_tokens or 0,
            stop_token_ids=tuple(dict.fromkeys((*stop_ids, *options.stop_token_ids))),
            logprobs=options.logprobs,
        )

    def _max_tokens(self, options: Options, num_prompt_tokens: int, param: str, default: int | None) -> int:
        if num_prompt_tokens < 1:
            raise InvalidRequest(f"{param} must hold at least one token", param=param)
        limit = self.model.max_context_tokens
        room = limit - num_prompt_tokens
        unsaid = room if default is None else min(default, room)
        max_tokens = max(unsaid, options.min_tokens or 0, 1) if options.max_tokens is None else options.max_tokens
        if max_tokens > room:
            field = "max_tokens" if options.max_tokens is not None and room > 0 else param
            raise ContextLengthExceeded(prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, limit_tokens=limit, param=field)
        return max_tokens

    def _messages(self, messages: Sequence[Message]) -> None:
        _counted("messages", messages, 1, self.limits.messages)
        for index, message in enumerate(messages):
            _message(f"messages[{index}]", message)
        check_conversation(messages, self.limits)

    def _answers(self) -> None:
        if not self.model.answers:
            raise NotSupported("this model gives embeddings and answers nothing; ask for embeddings, or another model", param="model")

    def _offered(self, model: str) -> None:
        if model != self.model.name:
            raise ModelNotFound(model, self.names)

    def _common(self, request: AnyRequest) -> None:
        self._offered(request.model)
        if len(request.request_id) > self.limits.id_chars or not IDENTIFIER.fullmatch(request.request_id):
            raise InvalidRequest(
                f"a request id must be 1 to {self.limits.id_chars} of the characters A-Z a-z 0-9 . _ : -", param="request_id"
            )
        _whole("priority", request.priority, -(1 << 31), (1 << 31) - 1)
        if request.deadline_s is not None and not math.isfinite(request.deadline_s):
            raise InvalidRequest("the deadline must be a finite time", param="deadline_s")

    def _options(self, options: Options, *, logprobs_param: str, least_tokens: int) -> None:
        limits = self.limits
        _number("temperature", options.temperature, 0, limits.temperature)
        _number("top_p", options.top_p, 0, 1, above_low=True)
        _number("min_p", options.min_p, 0, 1)
        _number("repetition_penalty", options.repetition_penalty, limits.least_repetition_penalty, limits.repetition_penalty)
        _number("presence_penalty", options.presence_penalty, -limits.penalty, limits.penalty)
        _number("frequency_penalty", options.frequency_penalty, -limits.penalty, limits.penalty)
        _whole("top_k", options.top_k, -1, (1 << 31) - 1)
        _whole("seed", options.seed, -(1 << 63), (1 << 63) - 1)
        _whole("n", options.n, 1, limits.choices)
        _whole("max_tokens", options.max_tokens, least_tokens, (1 << 31) - 1)
        _whole("min_tokens", options.min_tokens, 0, (1 << 31) - 1)
        _whole(logprobs_param, options.logprobs, 0, limits.top_logprobs)
        if options.max_tokens is not None and (options.min_tokens or 0) > options.max_tokens:
            raise InvalidRequest("min_tokens must not be greater than max_tokens", param="min_tokens")
        if options.format is not None and options.ignore_eos:
            raise InvalidRequest("an answer of a given form ends when it is whole: leave ignore_eos out", param="ignore_eos")
        self._stops(options)
        self._logit_bias(options)

    def _stops(self, options: Options) -> None:
        _counted("stop", options.stop, 0, self.limits.stop_strings)
        for stop in options.stop:
            if not 1 <= len(_text("stop", stop)) <= self.limits.stop_string_bytes:
                raise InvalidRequest(f"a stop string must have 1 to {self.limits.stop_string_bytes} bytes", param="stop")
        _counted("stop_token_ids", options.stop_token_ids, 0, self.limits.stop_token_ids)
        for token in options.stop_token_ids:
            self._token_id("stop_token_ids", token)

    def _logit_bias(self, options: Options) -> None:
        _counted("logit_bias", options.logit_bias, 0, self.limits.logit_bias_entries)
        for token, bias in options.logit_bias:
            self._token_id("logit_bias", token)
            _number("logit_bias", bias, -self.limits.logit_bias, self.limits.logit_bias)

    def _so_far(self, so_far: Sequence[SoFar], *, num_choices: int) -> None:
        limit = self.model.max_context_tokens
        check_so_far(so_far, num_choices=num_choices, vocabulary=self.model.num_real_tokens, most_tokens=limit)

    def _prompt_ids(self, ids: Sequence[int], *, param: str = "prompt", room: int = 1) -> None:
        if not ids:
            raise InvalidRequest(f"{param} must hold at least one token", param=param)
        if len(ids) + room > self.model.max_context_tokens:  # said before every id is looked at
            limit = self.model.max_context_tokens
            raise ContextLengthExceeded(prompt_tokens=len(ids), max_tokens=room, limit_tokens=limit, param=param)
        for token in ids:
            self._token_id(param, token)

    def _token_id(self, param: str, token: int) -> None:
        if type(token) is not int or not 0 <= token < self.model.num_real_tokens:
            raise InvalidRequest(f"{param} must hold token ids from 0 to {self.model.num_real_tokens - 1}", param=param)


def _message(param: str, message: Message) -> None:
    if message.role not in ROLES:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
    _text(f"{param}.content", message.content)
    if message.name is not None:
        _text(f"{param}.name", message.name)


def _text(param: str, text: str) -> bytes:
    """The text's UTF-8 bytes. JSON can smuggle in half a surrogate pair, which is no character."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be text", param=param)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds half a surrogate pair, which is no text", param=param) from None


def _counted(param: str, items: Sequence[object], low: int, high: int) -> None:
    if not low <= len(items) <= high:
        raise InvalidRequest(f"{param} must have {low} to {high} entries", param=param)


def _number(param: str, value: float | None, low: float, high: float, *, above_low: bool = False) -> None:
    if value is None:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN is within nothing
    if not fits or (above_low and value == low):
        raise InvalidRequest(
            f"{param} must be a number {'above' if above_low else 'from'} {low:g} {'and up ' if above_low else ''}to {high:g}", param=param
        )


def _whole(param: str, value: int | None, low: int, high: int) -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise InvalidRequest(f"{param} must be a whole number from {low} to {high}", param=param)


def _first(said: N | None, recommended: N | None, otherwise: N) -> N:
    return said if said is not None else recommended if recommended is not None else otherwise
