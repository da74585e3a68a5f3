"""Step 3 of a request: what a client asked, in one form for both fronts.

The fronts fill these from JSON or protobuf without judging values; `serve.validation` judges them for both.
None always means "the client did not say".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.plan import PhaseTimes, TokenLogprobs
from serve.caller import ANYONE, Caller
from serve.request_timing import Ledger

NO_PARAMETERS = '{"type": "object", "properties": {}, "additionalProperties": false}'


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """The form that an answer's text must have."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    text: str = ""
    """The schema as JSON, the expression, or the grammar."""
    choices: tuple[str, ...] = ()
    param: str = "response_format"
    """The client's field."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything about sampling and length that a client may say. Names are OpenAI's, then vLLM's."""

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
    """Number of alternatives; 0 = the sampled token only."""
    format: ResponseFormat | None = None


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS
    """Its arguments, as a JSON schema."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON, unless the answer was cut off at its length."""


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """News of a call: its beginning (with id and name), or more of its arguments."""

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
    """Of an assistant's message."""
    tool_call_id: str | None = None
    """Of a tool's message: which call it answers."""


@dataclass(frozen=True, kw_only=True)
class SoFar:
    """What a client has of one choice already, when it asks for the rest of an answer whose stream broke."""

    choice: int
    tokens: tuple[int, ...]
    finished: bool = False
    """Nothing is left to send of it."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    request_id: str
    model: str
    messages: tuple[Message, ...]
    options: Options = field(default_factory=Options)
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    """"auto", "none", "required" (whichever), or "function" (the one called `tool_name`)."""
    tool_name: str | None = None
    allowed_tools: frozenset[str] | None = None
    """Names of the only ones that the model is shown; None: all."""
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
    """`time.monotonic` when its front began to read it; None: it is the service that sees it first."""
    caller: Caller = ANYONE
    trace: Mapping[str, str] = field(default_factory=dict)
    """See `serve.trace_context`."""

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """Those of its tools that the model is shown, and may call."""
        return tuple(tool for tool in self.tools if self.allowed_tools is None or tool.name in self.allowed_tools)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    request_id: str
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    """Each answered with `n` choices; choice index = prompt index * n + choice, as OpenAI has it."""
    options: Options = field(default_factory=Options)
    echo: bool = False
    """The answer's text begins with the prompt's, and its log-probabilities, if any, with those of the prompt."""
    session: str = ""
    idempotency_key: str = ""
    so_far: tuple[SoFar, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    arrived_s: float | None = None
    caller: Caller = ANYONE
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    request_id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    """One vector each."""
    dimensions: int | None = None
    """Of each vector the first so many; None = all."""
    idempotency_key: str = ""
    session: str = ""
    priority: int = 0
    deadline_s: float | None = None
    arrived_s: float | None = None
    caller: Caller = ANYONE
    trace: Mapping[str, str] = field(default_factory=dict)


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """Which tokens a text, or a conversation, is for the model."""

    model: str
    input: str | tuple[Message, ...]
    add_special_tokens: bool = True
    """Of a text: with the control tokens that the tokenizer itself puts around one. A conversation's come from its template."""


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
    """One token with what `logprobs` asked for."""

    id: int
    text: str
    """The token alone; bytes that are no character by themselves show as U+FFFD."""
    raw: bytes
    logprobs: TokenLogprobs | None = None
    top: tuple[tuple[int, str, bytes, float], ...] = ()
    """(id, text, raw bytes, log-probability) of the alternatives."""
    of_text: bool = True
    """Its bytes are part of the text: it is no control token, and not the one that ended the answer."""


@dataclass(frozen=True, kw_only=True)
class TextEvent:
    """Step 13: new text of one choice, its end, or both. Concatenated texts are the whole answer, never half a character."""

    choice: int
    text: str = ""
    tokens: tuple[TextToken, ...] = ()
    """The tokens that this event's text came from (held-back text comes with a later token's event)."""
    prompt_tokens: tuple[TextToken, ...] = ()
    """In a choice's first event, where their log-probabilities were asked for; the first one has none, as nothing is before it."""
    embedding: bytes | None = None
    """float32, little-endian: all that a choice of an `EmbeddingRequest` gives, with its end. A choice is then an input."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """One for each call at most. What makes up calls is no part of `text`."""
    finish_reason: str | None = None
    """OpenAI's words: "stop", "length" or "tool_calls". A failure is raised, not reported here."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for the model's own end of sequence."""
    usage: Usage | None = None
    """Of the whole request, in the very last event of the stream only."""
    usage_so_far: Usage | None = None
    held_s: float = 0.0
    """How long the choice waited for a replica to start, in its first event only."""
    phase_times: PhaseTimes | None = None
    """With a choice's end: its time in the engine that ended it."""
    ledger: Ledger | None = None
    """Of the whole request, in the very last event of the stream only."""

    def with_usage_so_far(self, usage: "Usage") -> "TextEvent":
        """As `dataclasses.replace`, which takes ten times as long; there is one for every token."""
        other = object.__new__(TextEvent)
        other.__dict__.update(self.__dict__, usage_so_far=usage)
        return other


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
    """The whole answer of an unstreamed request."""

    request_id: str
    choices: tuple[ChoiceResult, ...]
    usage: Usage
    held_s: float = 0.0
    """The longest that a choice waited for a replica to start."""
    ledger: Ledger | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingResult:
    """The vectors of all inputs, in their order: float32, little-endian."""

    request_id: str
    vectors: tuple[bytes, ...]
    usage: Usage
    held_s: float = 0.0
    ledger: Ledger | None = None
