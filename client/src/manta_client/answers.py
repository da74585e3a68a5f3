"""The results of calls. Each keeps its protobuf message as `.raw`."""

from dataclasses import dataclass, field

from ._generated import messages_pb2, service_pb2


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """An alternative token at one position."""

    token_id: int
    token: str
    """The token alone; bytes that are not a whole character become U+FFFD."""
    bytes: bytes
    logprob: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The token at one position, and the most probable ones there."""

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
    """Prompt tokens found in the server's prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool call by the model."""

    id: str
    name: str
    arguments: str
    """JSON that fits the tool's schema, unless the answer was cut off at its maximum length."""


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """Part of a call: its beginning, with id and name, or more of its arguments."""

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
    """The stop string or stop token id that ended it; None at the model's end of sequence or the maximum length."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One per token id if they were requested, else empty."""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With `echo` and log-probabilities: of the prompt's tokens from the second on."""


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
    """The vector of one input."""

    index: int
    """The index of the input."""
    vector: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EmbeddingList:
    """The vectors of all inputs, in their order."""

    id: str
    model: str
    data: tuple[Embedding, ...]
    usage: Usage
    raw: service_pb2.EmbedResponse = field(repr=False, compare=False)

    @property
    def vector(self) -> tuple[float, ...]:
        """The vector of the first input."""
        return self.data[0].vector


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New output of one choice, or its end."""

    index: int
    text: str = ""
    offset: int = 0
    """Output position of the first of `token_ids`."""
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
    """The text of each token, if requested; bytes that are not a whole character become U+FFFD."""
    max_model_len: int
    """Maximum of prompt and output tokens together."""
    raw: service_pb2.TokenizeResponse = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the server."""

    id: str
    created: int
    """Unix seconds."""
    owned_by: str
    max_model_len: int
    """Maximum of prompt and output tokens together."""
    root: str = ""
    """Its source: the adapter if there is one, else the checkpoint."""
    parent: str | None = None
    """The checkpoint that the adapter is added to; None without an adapter."""
    raw: messages_pb2.Model = field(repr=False, compare=False)
