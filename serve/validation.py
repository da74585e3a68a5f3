"""Place 3 of a request: validates it, for HTTP and gRPC, and fills in the defaults of its options.

Error messages say what is valid, and never repeat what the client sent.
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
"""Default ``max_tokens`` of a completion (OpenAI's API reference). That of a chat is the rest of the context."""
NON_NEGATIVE_INT64 = (1 << 63) - 1
IDENTIFIER = re.compile(r"[A-Za-z0-9._:-]+")


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Validates the requests for one model. Every method raises `InvalidRequest` or a subclass, which names the field."""

    model: ModelFacts
    limits: Limits
    names: Sequence[str] = ()
    """The names of all models of the server, for errors."""

    def chat(self, request: ChatRequest) -> None:
        """Everything that can be checked before the messages are tokenized."""
        self._common(request)
        self._check_generates()
        self._messages(request.messages)
        check_tools(request, self.limits)
        self._options(request.options, logprobs_param="top_logprobs", min_max_tokens=1)
        self._so_far(request.so_far, num_choices=request.options.n or 1)

    def completion(self, request: CompletionRequest) -> None:
        """Everything that can be checked before the prompts are tokenized."""
        self._common(request)
        self._check_generates()
        _check_count("prompt", request.prompts, 1, self.limits.prompts)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                _check_text("prompt", prompt)
            else:
                self._prompt_ids(prompt)
        self._options(request.options, logprobs_param="logprobs", min_max_tokens=0)
        if len(request.prompts) * (request.options.n or 1) > self.limits.total_choices:
            raise InvalidRequest(f"prompts times n must be at most {self.limits.total_choices}", param="n")
        if request.options.max_tokens == 0 and not request.echo:
            raise InvalidRequest("max_tokens must be at least 1, or 0 together with echo", param="max_tokens")
        self._so_far(request.so_far, num_choices=len(request.prompts) * (request.options.n or 1))

    def prompt_logprobs(self, request: CompletionRequest, num_prompt_tokens: int) -> int | None:
        """How many alternatives are wanted for each token of the prompts; None: no log-probabilities are wanted.

        ``num_prompt_tokens``: of all prompts together.
        """
        top, limit = request.options.logprobs, self.limits.prompt_logprobs
        if not request.echo or top is None:
            return None
        wanted = num_prompt_tokens * (request.options.n or 1) * (1 + top)
        if wanted > limit:
            raise InvalidRequest(
                f"echo with logprobs={top} asks for {wanted} log-probabilities of the prompts, and at most {limit} are allowed; "
                "send fewer or shorter prompts, or ask for fewer alternatives",
                param="logprobs",
            )
        return top

    def embedding(self, request: EmbeddingRequest) -> None:
        """Everything that can be checked before the inputs are tokenized."""
        self._common(request)
        if self.model.pooling is None:
            raise NotSupported(
                "this model gives no embeddings: its files name no pooling; to get some, start the server with --set model.pooling=last",
                param="model",
            )
        _check_count("input", request.inputs, 1, self.limits.embedding_inputs)
        for one in request.inputs:
            if isinstance(one, str):
                _check_text("input", one)
            else:
                self._prompt_ids(one, param="input", room=0)
        _check_integer("dimensions", request.dimensions, 1, self.model.width)

    def embedding_length(self, num_tokens: int) -> None:
        limit = self.model.max_context_tokens
        if num_tokens < 1:
            raise InvalidRequest("each input must hold at least one token", param="input")
        if num_tokens > limit:
            raise ContextLengthExceeded(prompt_tokens=num_tokens, max_tokens=0, limit_tokens=limit, param="input")

    def tokenize(self, request: TokenizeRequest) -> None:
        self._offered(request.model)
        if isinstance(request.input, str):
            _check_text("prompt", request.input)
        else:
            self._messages(request.input)

    def detokenize(self, model: str, ids: Sequence[int]) -> None:
        self._offered(model)
        for token in ids:
            self._token_id("tokens", token)

    def sampling(self, options: Options, *, num_prompt_tokens: int, param: str, max_tokens: int | None, seed: int) -> SamplingParams:
        """The sampling parameters of valid ``options``: the client's value, else the model's default, else off.

        ``param``: name of the prompt's field. ``max_tokens``, ``seed``: defaults (``max_tokens`` None: the rest of the context).
        """
        defaults = self.model.defaults
        stop_ids = () if options.ignore_eos else defaults.eos_token_ids
        top_k = _first_given(options.top_k, defaults.top_k, 0)
        return SamplingParams(
            repetition_penalty=float(_first_given(options.repetition_penalty, defaults.repetition_penalty or None, 1.0)),
            presence_penalty=float(_first_given(options.presence_penalty, None, 0.0)),
            frequency_penalty=float(_first_given(options.frequency_penalty, None, 0.0)),
            logit_bias=tuple((token, float(bias)) for token, bias in options.logit_bias),
            temperature=float(_first_given(options.temperature, defaults.temperature, 1.0)),
            top_k=top_k if 0 < top_k < self.model.num_real_tokens else 0,
            top_p=float(_first_given(options.top_p, defaults.top_p or None, 1.0)),
            min_p=float(_first_given(options.min_p, None, 0.0)),
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
        unset = room if default is None else min(default, room)
        max_tokens = max(unset, options.min_tokens or 0, 1) if options.max_tokens is None else options.max_tokens
        if max_tokens > room:
            generated = "min_tokens" if options.max_tokens is None else "max_tokens"
            field = generated if room > 0 else param
            raise ContextLengthExceeded(prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, limit_tokens=limit, param=field)
        return max_tokens

    def _messages(self, messages: Sequence[Message]) -> None:
        _check_count("messages", messages, 1, self.limits.messages)
        for index, message in enumerate(messages):
            _check_message(f"messages[{index}]", message)
        check_conversation(messages, self.limits)

    def _check_generates(self) -> None:
        if not self.model.answers:
            raise NotSupported("this is an embedding model and generates no text; use /v1/embeddings, or another model", param="model")

    def _offered(self, model: str) -> None:
        if model != self.model.name:
            raise ModelNotFound(model, self.names)

    def _common(self, request: AnyRequest) -> None:
        self._offered(request.model)
        if len(request.request_id) > self.limits.id_chars or not IDENTIFIER.fullmatch(request.request_id):
            raise InvalidRequest(
                f"a request id must be 1 to {self.limits.id_chars} of the characters A-Z a-z 0-9 . _ : -", param="request_id"
            )
        check_priority(request.priority, self.limits)
        if request.deadline_s is not None and not math.isfinite(request.deadline_s):
            raise InvalidRequest("the deadline must be a finite time", param="deadline_s")

    def _options(self, options: Options, *, logprobs_param: str, min_max_tokens: int) -> None:
        limits = self.limits
        _check_number("temperature", options.temperature, 0, limits.temperature)
        _check_number("top_p", options.top_p, 0, 1, above_low=True)
        _check_number("min_p", options.min_p, 0, 1)
        _check_number("repetition_penalty", options.repetition_penalty, limits.least_repetition_penalty, limits.repetition_penalty)
        _check_number("presence_penalty", options.presence_penalty, -limits.penalty, limits.penalty)
        _check_number("frequency_penalty", options.frequency_penalty, -limits.penalty, limits.penalty)
        _check_integer("top_k", options.top_k, -1, (1 << 31) - 1)
        _check_integer("seed", options.seed, -(1 << 63), (1 << 63) - 1)
        _check_integer("n", options.n, 1, limits.choices)
        _check_integer("max_tokens", options.max_tokens, min_max_tokens, (1 << 31) - 1)
        _check_integer("min_tokens", options.min_tokens, 0, (1 << 31) - 1)
        _check_integer(logprobs_param, options.logprobs, 0, limits.top_logprobs)
        if options.max_tokens is not None and (options.min_tokens or 0) > options.max_tokens:
            raise InvalidRequest("min_tokens must not be greater than max_tokens", param="min_tokens")
        if options.format is not None and options.ignore_eos:
            raise InvalidRequest(
                "ignore_eos cannot be combined with a response format, whose answers end when they are complete; leave it out",
                param="ignore_eos",
            )
        self._stops(options)
        self._logit_bias(options)

    def _stops(self, options: Options) -> None:
        _check_count("stop", options.stop, 0, self.limits.stop_strings)
        for stop in options.stop:
            if not 1 <= len(_check_text("stop", stop)) <= self.limits.stop_string_bytes:
                raise InvalidRequest(f"a stop string must have 1 to {self.limits.stop_string_bytes} bytes", param="stop")
        _check_count("stop_token_ids", options.stop_token_ids, 0, self.limits.stop_token_ids)
        for token in options.stop_token_ids:
            self._token_id("stop_token_ids", token)

    def _logit_bias(self, options: Options) -> None:
        _check_count("logit_bias", options.logit_bias, 0, self.limits.logit_bias_entries)
        for token, bias in options.logit_bias:
            self._token_id("logit_bias", token)
            _check_number("logit_bias", bias, -self.limits.logit_bias, self.limits.logit_bias)

    def _so_far(self, so_far: Sequence[SoFar], *, num_choices: int) -> None:
        limit = self.model.max_context_tokens
        check_so_far(so_far, num_choices=num_choices, vocabulary=self.model.num_real_tokens, most_tokens=limit)

    def _prompt_ids(self, ids: Sequence[int], *, param: str = "prompt", room: int = 1) -> None:
        if not ids:
            raise InvalidRequest(f"{param} must hold at least one token", param=param)
        if len(ids) + room > self.model.max_context_tokens:  # checked before looking at every id
            limit = self.model.max_context_tokens
            raise ContextLengthExceeded(prompt_tokens=len(ids), max_tokens=room, limit_tokens=limit, param=param)
        for token in ids:
            self._token_id(param, token)

    def _token_id(self, param: str, token: int) -> None:
        if type(token) is not int or not 0 <= token < self.model.num_real_tokens:
            raise InvalidRequest(f"{param} must hold token ids from 0 to {self.model.num_real_tokens - 1}", param=param)


def check_priority(value: object, limits: Limits, *, param: str = "priority") -> int:
    """The priority that HTTP's header or body or gRPC's field asks for.

    Raises:
        InvalidRequest: it is not a number in the range of `Limits.priority`; names ``param``.
    """
    return _whole_number(param, value, -limits.priority, limits.priority)


def _check_message(param: str, message: Message) -> None:
    if message.role not in ROLES:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
    _check_text(f"{param}.content", message.content)
    if message.name is not None:
        _check_text(f"{param}.name", message.name)


def _check_text(param: str, text: str) -> bytes:
    """The text's UTF-8 bytes. JSON can contain half a surrogate pair, which is not a character."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be text", param=param)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds half a surrogate pair, which is not text", param=param) from None


def _check_count(param: str, items: Sequence[object], low: int, high: int) -> None:
    if not low <= len(items) <= high:
        raise InvalidRequest(f"{param} must have {low} to {high} entries", param=param)


def _check_number(param: str, value: float | None, low: float, high: float, *, above_low: bool = False) -> None:
    if value is None:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN fails every comparison
    if not fits or (above_low and value == low):
        raise InvalidRequest(
            f"{param} must be a number {'above' if above_low else 'from'} {low:g} {'and up ' if above_low else ''}to {high:g}", param=param
        )


def _check_integer(param: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        _whole_number(param, value, low, high)


def _whole_number(param: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{param} must be a whole number from {low} to {high}", param=param)
    return value


def _first_given(requested: N | None, recommended: N | None, default: N) -> N:
    return requested if requested is not None else recommended if recommended is not None else default
