"""What a tool protocol is: how OpenAI's tools and calls become the text that a family of models was trained on, and back."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve.request import Message, Tool, ToolCallDelta

ProtocolName = Literal["auto", "qwen_agent", "hermes"]
ANY_TEXT = r"(.|\n)*"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation in the form of a chat template that knows no tools."""

    messages: list[dict[str, Any]]
    prefix: str = ""
    """The beginning of the assistant's turn, which the model continues."""


def render_without_tools(messages: Sequence[Message]) -> Rendered:
    """A conversation that has no tools and no calls."""
    return Rendered(
        messages=[
            {"role": message.role, "content": message.content} | ({} if message.name is None else {"name": message.name})
            for message in messages
        ]
    )


@dataclass(frozen=True, kw_only=True)
class CallRules:
    """Which calls an answer may contain."""

    tools: Sequence[Tool]
    """Those that may be called; empty: no calls."""
    shown: Sequence[Tool]
    """Those that are described to the model."""
    required: bool
    """The answer is at least one call, and no text."""
    parallel: bool
    schemas: Sequence[str]
    """The JSON schema of each tool's arguments, as `serve.structured` writes it."""
    answer: str | None = None
    """JSON schema of an answer that is not a call; None: any text."""
    has_own_grammar: bool = False
    """The answer has a format other than JSON, and no tool may be called: the grammar is the format's, not the protocol's, and applies from
    the answer's first character."""


@dataclass(frozen=True, slots=True)
class ParsedPiece:
    """A parsed part of an answer: content, or a delta of a call."""

    content: str = ""
    call: ToolCallDelta | None = None


class ToolCallParser(Protocol):
    """Parses the text of one choice as it arrives."""

    def push(self, text: str) -> list[ParsedPiece]: ...

    def flush(self) -> list[ParsedPiece]:
        """At the end of the text: what was held back."""
        ...

    @property
    def in_arguments(self) -> bool:
        """Whether the text so far ends within the arguments of a call."""
        ...


class ToolProtocol(Protocol):
    """How one family of models writes tools and calls."""

    name: str

    def render(self, messages: Sequence[Message], rules: CallRules) -> Rendered:
        """The conversation with the tools described in it. Text of the client is escaped so that it holds no marker."""
        ...

    def grammar(self, rules: CallRules, *, continues: bool) -> str:
        """A Lark grammar of the answers that ``rules`` allow. ``continues``: the answer follows a `Rendered.prefix`."""
        ...

    def parser(self, *, continues: bool, calls_come_first: bool = False) -> ToolCallParser:
        """``calls_come_first``: an answer with calls begins with one, so that markers further in are text of the answer."""
        ...


class Markers:
    """The marker texts of a protocol. To the tokenizer they are ordinary text, so they must be escaped in the text of clients."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._pattern = re.compile(f"(?={'|'.join(map(re.escape, markers))})(.)")  # a lookahead, because markers may overlap

    def escape(self, text: str) -> str:
        """``text`` with a zero-width space after the first character of every marker, which looks the same and is not a marker."""
        return self._pattern.sub("\\1\u200b", text)

    def escape_json(self, value: Any) -> Any:
        """`escape` for every string in a JSON value."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {self.escape(key): self.escape_json(item) for key, item in value.items()}
        return [self.escape_json(item) for item in value] if isinstance(value, list) else value


@dataclass(eq=False)
class ArgumentsScanner:
    """Finds the end of a JSON object in a stream of text, whatever its strings contain."""

    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    ended: bool = field(default=False)

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the object."""
        for at, character in enumerate(text):
            if self._in_string:
                self._scan_string(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.ended = True
                    return at + 1
        return len(text)

    def _scan_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False


def length_held_back(text: str, markers: Sequence[str]) -> int:
    """How many characters to hold back: the longest end of ``text`` that could begin a marker, and the white space before it."""
    longest = max(map(len, markers))
    partial = next(
        (k for k in range(min(longest - 1, len(text)), 0, -1) if any(marker.startswith(text[-k:]) for marker in markers)),
        0,
    )
    kept = text[: len(text) - partial].rstrip()
    return len(text) - len(kept)
