"""What a fake server answers, and what it was asked."""

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DIMENSIONS = 8
"""Of vectors that are not in the script."""
WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool that an answer asks for."""

    name: str
    arguments: str = "{}"
    """JSON."""
    id: str = "call_1"


@dataclass(frozen=True)
class Answer:
    """An answer; every choice of a request gets it."""

    text: str = "This is a test."
    tool_calls: Sequence[Call] = field(default=(), kw_only=True)
    finish_reason: str = field(default="", kw_only=True)
    """"stop", "length" or "tool_calls"; if not said, what fits."""
    pieces: Sequence[str] = field(default=(), kw_only=True)
    """How a stream cuts the text, a token each; words if not said."""
    vectors: Sequence[Sequence[float]] = field(default=(), kw_only=True)
    """What a request for embeddings gets, one for each input; of length 1 and by the input alone if not said."""
    pause_s: float = field(default=0.0, kw_only=True)
    """Before every piece of a stream, and once before a whole answer."""
    breaks_after: int | None = field(default=None, kw_only=True)
    """The connection is lost after so many pieces, once. Whoever asks for the rest gets it."""

    def words(self) -> tuple[str, ...]:
        return tuple(self.pieces) or tuple(WORD.findall(self.text))

    @property
    def ending(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


@dataclass(frozen=True)
class Failure:
    """A refusal, or an error in the midst of a stream."""

    code: str = "UNAVAILABLE"
    """Name of a `grpc.StatusCode`."""
    message: str = "scripted to fail"
    reason: str = field(default="scripted", kw_only=True)
    """What `CallFailed.reason` says."""
    param: str | None = field(default=None, kw_only=True)
    retry_after_s: float | None = field(default=None, kw_only=True)
    after: int = field(default=0, kw_only=True)
    """A stream gives so many pieces of the default answer before it."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A request that came."""

    kind: str
    """"chat", "completion" or "embedding"."""
    protocol: str
    """"grpc" or "http"."""
    streamed: bool
    model: str
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | Sequence[int]] = ()
    """Of a completion, or the inputs of a request for embeddings."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those that were said, by name."""
    tools: Sequence[str] = ()
    """Their names."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of HTTP, or gRPC's metadata; names in small letters."""
    had: Mapping[int, int] = field(default_factory=dict)
    """Of a stream that broke: by choice, how many tokens its client has already."""
    finished: frozenset[int] = frozenset()
    """Choices that it has whole."""

    @property
    def num_choices(self) -> int:
        return int(self.options.get("n") or 1) * max(1, len(self.prompts))

    @property
    def key(self) -> str:
        return self.headers.get("idempotency-key", "")


Item = Answer | Failure | Callable[[Received], "Answer | Failure"]


class Script:
    """What comes next. Safe between threads."""

    def __init__(self, default: Answer | None = None) -> None:
        self.default = default or Answer()
        self.requests: list[Received] = []
        self._items: list[Item] = []
        self._answered: dict[str, Answer] = {}
        """By idempotency key: it is answered once."""
        self._broken: set[str] = set()
        self._vocabulary: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, items: Sequence[Item]) -> None:
        with self._lock:
            self._items += items

    def next(self, request: Received) -> Answer | Failure:
        """What this request gets."""
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
        """Whether the stream of this request breaks before the piece at ``place``; each breaks once."""
        if answer.breaks_after != place or request.key in self._broken:
            return False
        self._broken.add(request.key)
        return True

    def token_ids(self, words: Sequence[str]) -> list[int]:
        """Ids of the fake's own: a number for every word it has met."""
        with self._lock:
            return [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """
        Raises:
            KeyError: it has met no such word.
        """
        words = {number: word for word, number in self._vocabulary.items()}
        return "".join(words[number] for number in token_ids)

    def prompt_tokens(self, request: Received) -> int:
        """Words of what was asked."""
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
    """The pieces, as many as the client wants at most."""
    words = answer.words()
    yield from words if limit is None else words[:limit]


def ending_of(answer: Answer, limit: int | None) -> str:
    return "length" if limit is not None and limit < len(answer.words()) else answer.ending
