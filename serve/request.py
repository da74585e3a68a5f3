"""The requests and results of the service, in one form for HTTP and gRPC.

HTTP and gRPC fill the requests from JSON or protobuf without validating values; `serve.validation` validates them for both. None always
means that the client did not set a field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.plan import PhaseTimes, TokenLogprobs
from serve.caller import ANONYMOUS, Caller
from serve.request_timing import RequestTiming

NO_PARAMETERS = '{"type": "object", "properties": {}, "additionalProperties": false}'


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """The format that the text of an answer must have."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    text: str = ""
    """The JSON schema, regular expression or grammar."""
    choices: tuple[str, ...] = ()
    param: str = "response_format"
    """The client's field, for errors."""

    @property
    def is_json(self) -> bool:
        return self.kind in ("json_object", "json_schema")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a client can set about sampling and length. The names are OpenAI's, otherwise vLLM's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives; 0: only the sampled token."""
    format: ResponseFormat | None = None


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS
    """JSON schema of its arguments."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON, unless the answer was cut off at its maximum length or by a stop string."""


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A part of a call: its beginning (with id and name), or more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def with_more(self, arguments: str) -> "ToolCallDelta":
        return replace(self, arguments=self.arguments + arguments)


@dataclass(frozen=True, kw_only=True)
class Message:
    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    """In an assistant's message."""
    tool_call_id: str | None = None
    """In a tool's message: the call that it answers."""


@dataclass(frozen=True, kw_only=True)
class SoFar:
    """What a client already has of one choice, when it asks for the rest of an answer whose stream broke."""

    choice: int
    tokens: tuple[int, ...]
    finished: bool = False
    """The client has the whole choice."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    request_id: str
    model: str
    messages: tuple[Message, ...]
    options: Options = field(default_factory=Options)
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    """"auto", "none", "required" (any), or "function" (the one named `tool_name`)."""
    tool_name: str | None = None
    allowed_tools: frozenset[str] | None = None
    """Names of the tools that the model is shown; None: all."""
    parallel_tool_calls: bool = True
    session: str = ""
    """See `serve.session`."""
    idempotency_key: str = ""
    """See `serve.idempotency`."""
    so_far: tuple[SoFar, ...] = ()
    """See `serve.stream_resume`."""
    priority: int = 0
    deadline_s: float | None = None
    """Unix time."""
    arrived_s: float | None = None
    """`time.monotonic` when the front began to read it; None: when it reaches the service."""
    caller: Caller = ANONYMOUS
    trace: Mapping[str, str] = field(default_factory=dict)
    """See `serve.trace_context`."""

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """The tools that the model is shown and may call."""
        return tuple(tool for tool in self.tools if self.allowed_tools is None or tool.name in self.allowed_tools)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    request_id: str
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    """Each gets `n` choices; choice index = prompt index * n + choice, as in OpenAI's API."""
    options: Options = field(default_factory=Options)
    echo: bool = False
    """The answer begins with the prompt: its text, and its log-probabilities if they are wanted."""
    session: str = ""
    idempotency_key: str = ""
    so_far: tuple[SoFar, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    arrived_s: float | None = None
    caller: Caller = ANONYMOUS
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    request_id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    """One vector each."""
    dimensions: int | None = None
    """Length of the vectors, which are cut to it; None: all dimensions."""
    idempotency_key: str = ""
    session: str = ""
    priority: int = 0
    deadline_s: float | None = None
    arrived_s: float | None = None
    caller: Caller = ANONYMOUS
    trace: Mapping[str, str] = field(default_factory=dict)


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """Asks for the tokens of a text or a conversation."""

    model: str
    input: str | tuple[Message, ...]
    add_special_tokens: bool = True
    """Adds the control tokens that the tokenizer puts around a text. Those of a conversation come from its template."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class TextToken:
    """One token, with its log-probabilities if they are wanted."""

    id: int
    text: str
    """The token alone; bytes that are not a whole character become U+FFFD."""
    raw: bytes
    logprobs: TokenLogprobs | None = None
    top: tuple[tuple[int, str, bytes, float], ...] = ()
    """(id, text, raw bytes, log-probability) of the alternatives."""
    of_text: bool = True
    """Its bytes are part of the text: it is not a control token, and not the one that ended the answer."""


@dataclass(frozen=True, kw_only=True)
class TextEvent:
    """New text of one choice, its end, or both. The texts of all events are the whole answer; no character is split."""

    choice: int
    text: str = ""
    tokens: tuple[TextToken, ...] = ()
    """The tokens of this event's text. If text is held back, its tokens come with a later event."""
    prompt_tokens: tuple[TextToken, ...] = ()
    """In a choice's first event, if their log-probabilities are wanted. The first token has none, as nothing precedes it."""
    embedding: bytes | None = None
    """For an `EmbeddingRequest`, where each input is a choice with this one event: its vector (float32, little-endian)."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """At most one for each call. The text of calls is not part of `text`."""
    finish_reason: str | None = None
    """"stop", "length" or "tool_calls", as in OpenAI's API. A failure is raised instead."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None: the model's end of sequence."""
    usage: Usage | None = None
    """Of the whole request, only in the last event of the stream."""
    usage_so_far: Usage | None = None
    held_s: float = 0.0
    """How long the choice was held until a replica had started; only in its first event."""
    phase_times: PhaseTimes | None = None
    """In a choice's last event: its times in the engine."""
    timing: RequestTiming | None = None
    """Of the whole request, only in the last event of the stream."""

    def with_usage_so_far(self, usage: "Usage") -> "TextEvent":
        """Like `dataclasses.replace`, which takes ten times as long. This runs for every token."""
        copy = object.__new__(TextEvent)
        copy.__dict__.update(self.__dict__, usage_so_far=usage)
        return copy


@dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    choice: int
    text: str
    tokens: tuple[TextToken, ...]
    finish_reason: str
    stop_reason: str | int | None
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_tokens: tuple[TextToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an unstreamed request."""

    request_id: str
    choices: tuple[ChoiceResult, ...]
    usage: Usage
    held_s: float = 0.0
    """The longest that a choice was held until a replica had started."""
    timing: RequestTiming | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingResult:
    """The vectors of all inputs, in their order: float32, little-endian."""

    request_id: str
    vectors: tuple[bytes, ...]
    usage: Usage
    held_s: float = 0.0
    timing: RequestTiming | None = None
