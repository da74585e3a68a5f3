"""The scripted answers of a fake server, and the requests that it received."""

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DIMENSIONS = 8
"""Length of vectors that are not scripted."""
WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call in an answer."""

    name: str
    arguments: str = "{}"
    """JSON."""
    id: str = "call_1"


@dataclass(frozen=True)
class Answer:
    """An answer, for every choice of a request."""

    text: str = "This is a test."
    tool_calls: Sequence[Call] = field(default=(), kw_only=True)
    finish_reason: str = field(default="", kw_only=True)
    """"stop", "length" or "tool_calls"; default: what fits."""
    pieces: Sequence[str] = field(default=(), kw_only=True)
    """The pieces of a stream, one token each; default: words."""
    vectors: Sequence[Sequence[float]] = field(default=(), kw_only=True)
    """The vectors of a request for embeddings, one for each input; default: of length 1, derived from the input."""
    pause_s: float = field(default=0.0, kw_only=True)
    """Pause before every piece of a stream, or before a whole answer."""
    breaks_after: int | None = field(default=None, kw_only=True)
    """The connection is lost once after this many pieces. A client that asks for the rest gets it."""

    def words(self) -> tuple[str, ...]:
        return tuple(self.pieces) or tuple(WORD.findall(self.text))

    @property
    def ending(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


@dataclass(frozen=True)
class Failure:
    """An error instead of an answer, or in the middle of a stream."""

    code: str = "UNAVAILABLE"
    """Name of a `grpc.StatusCode`."""
    message: str = "scripted to fail"
    reason: str = field(default="scripted", kw_only=True)
    """`CallFailed.reason`."""
    param: str | None = field(default=None, kw_only=True)
    retry_after_s: float | None = field(default=None, kw_only=True)
    after: int = field(default=0, kw_only=True)
    """A stream sends this many pieces of the default answer before it."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A received request."""

    kind: str
    """"chat", "completion" or "embedding"."""
    protocol: str
    """"grpc" or "http"."""
    streamed: bool
    model: str
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | Sequence[int]] = ()
    """Prompts of a completion, or inputs of a request for embeddings."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options that were set, by name."""
    tools: Sequence[str] = ()
    """Names of the tools."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers or gRPC metadata, with lower-case names."""
    had: Mapping[int, int] = field(default_factory=dict)
    """When a stream is resumed: by choice, how many tokens the client already has."""
    finished: frozenset[int] = frozenset()
    """Choices that the client has completely."""

    @property
    def num_choices(self) -> int:
        return int(self.options.get("n") or 1) * max(1, len(self.prompts))

    @property
    def key(self) -> str:
        return self.headers.get("idempotency-key", "")


Item = Answer | Failure | Callable[[Received], "Answer | Failure"]


class Script:
    """The scripted answers that come next. Thread-safe."""

    def __init__(self, default: Answer | None = None) -> None:
        self.default = default or Answer()
        self.requests: list[Received] = []
        self._items: list[Item] = []
        self._answered: dict[str, Answer] = {}
        """Answers by idempotency key, which are given again."""
        self._broken: set[str] = set()
        self._vocabulary: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, items: Sequence[Item]) -> None:
        with self._lock:
            self._items += items

    def next(self, request: Received) -> Answer | Failure:
        """The answer or failure for this request."""
        with self._lock:
            self.requests.append(request)
            if request.key in self._answered:
                return self._answered[request.key]
            item: Item = self._items.pop(0) if self._items else self.default
        chosen = item(request) if callable(item) else item
        if isinstance(chosen, Answer) and request.key:
            self._answered[request.key] = chosen
        return chosen

    def breaks_now(self, request: Received, answer: Answer, place: int) -> bool:
        """Whether the stream of this request breaks before the piece at ``place``. Each stream breaks only once."""
        if answer.breaks_after != place or request.key in self._broken:
            return False
        self._broken.add(request.key)
        return True

    def token_ids(self, words: Sequence[str]) -> list[int]:
        """The fake server's own token ids: a number for every word that it has seen."""
        with self._lock:
            return [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """
        Raises:
            KeyError: there is no such id.
        """
        words = {number: word for word, number in self._vocabulary.items()}
        return "".join(words[number] for number in token_ids)

    def prompt_tokens(self, request: Received) -> int:
        """Number of words in the request."""
        texts = [str(message.get("content") or "") for message in request.messages]
        texts += [prompt for prompt in request.prompts if isinstance(prompt, str)]
        return sum(len(WORD.findall(text)) for text in texts) + sum(len(one) for one in request.prompts if not isinstance(one, str))


def vectors_of(answer: Answer, request: Received) -> list[list[float]]:
    """A vector for each input, shorter where `dimensions` says so."""
    size = int(request.options.get("dimensions") or 0) or None
    return [_unit(one[:size]) if size else list(one) for one in answer.vectors or [_vector(one) for one in request.prompts]]


def _vector(text: str | Sequence[int]) -> list[float]:
    digest = hashlib.sha256(repr(text if isinstance(text, str) else tuple(text)).encode()).digest()
    return _unit([byte / 127.5 - 1 for byte in digest[:DIMENSIONS]])


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector) or 1.0
    return [number / length for number in vector]


def pieces_of(answer: Answer, limit: int | None) -> Iterator[str]:
    """The pieces of the answer, at most ``limit``."""
    words = answer.words()
    yield from words if limit is None else words[:limit]


def ending_of(answer: Answer, limit: int | None) -> str:
    return "length" if limit is not None and limit < len(answer.words()) else answer.ending
