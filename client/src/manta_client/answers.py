"""What calls give back. Every answer keeps the protobuf message it was read from as `.raw`."""

from dataclasses import dataclass, field

from ._generated import messages_pb2, service_pb2


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """A token that could have come at one place."""

    token_id: int
    token: str
    """The token alone; bytes that are no character by themselves show as U+FFFD."""
    bytes: bytes
    logprob: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The token that came at one place, and the most probable ones there."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top_logprobs: tuple[TopLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of the whole request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    """Prompt tokens that were in the server's prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool that the model asks for."""

    id: str
    name: str
    arguments: str
    """JSON that fits the tool's schema, unless the answer was cut off at its length."""


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """News of a call: its beginning, with id and name, or more of its arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer."""

    index: int
    text: str
    finish_reason: str
    """"stop", "length" or "tool_calls"."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended it; None at the model's own end or a length."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One per token id if asked for, else empty."""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, with `echo` if log-probabilities were asked for."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The whole answer to prompts."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    raw: service_pb2.GenerateResponse = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True)
class ChatCompletion:
    """The whole answer to a conversation."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    raw: service_pb2.ChatResponse = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What a text means to the model, as a vector."""

    index: int
    """Which input it is of."""
    vector: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EmbeddingList:
    """One for each input, in their order."""

    id: str
    model: str
    data: tuple[Embedding, ...]
    usage: Usage
    raw: service_pb2.EmbedResponse = field(repr=False, compare=False)

    @property
    def vector(self) -> tuple[float, ...]:
        """That of the first input."""
        return self.data[0].vector


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New output of one choice, or its end."""

    index: int
    text: str = ""
    offset: int = 0
    """Output place of the first of `token_ids`."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """In a choice's first delta; see `Choice`."""
    finish_reason: str | None = None
    """Set in a choice's last delta, which has no text."""
    stop_reason: str | int | None = None
    raw: messages_pb2.Delta | messages_pb2.Finish = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """The token ids of a text or a conversation."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """Each token's text by itself if asked for; bytes that are no character by themselves show as U+FFFD."""
    max_model_len: int
    """Prompt and output tokens that the model takes together, at most."""
    raw: service_pb2.TokenizeResponse = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model the server answers for."""

    id: str
    created: int
    """Unix seconds."""
    owned_by: str
    max_model_len: int
    """Prompt and output tokens together, at most."""
    root: str = ""
    """What it is made of by its own name: the adapter if there is one, else the checkpoint."""
    parent: str | None = None
    """The checkpoint that the adapter is added to; None without an adapter."""
    raw: messages_pb2.Model = field(repr=False, compare=False)
