"""The seam between OpenAI's tools and the text that a model was trained to write."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve.request import Message, Tool, ToolCallDelta

ProtocolName = Literal["auto", "qwen_agent", "hermes"]
ANY_TEXT = r"(.|\n)*"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation that a chat template without tools can render."""

    messages: list[dict[str, Any]]
    prefix: str = ""
    """What the assistant's turn has already; the model goes on behind it."""


def plainly_rendered(messages: Sequence[Message]) -> Rendered:
    """A conversation without tools."""
    return Rendered(
        messages=[
            {"role": message.role, "content": message.content} | ({} if message.name is None else {"name": message.name})
            for message in messages
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Which calls an answer may have."""

    tools: Sequence[Tool]
    """Those that may be called. Empty: none."""
    told: Sequence[Tool]
    """Those that the model is told of."""
    must: bool
    """At least one call, and no text beside it."""
    parallel: bool
    schemas: Sequence[str]
    """What each tool's arguments must be, as `serve.structured` writes JSON schemas."""
    answer: str | None = None
    """The schema of an answer that is no call; None = any text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a reader made of some text: content, or news of a call."""

    content: str = ""
    call: ToolCallDelta | None = None


class Reader(Protocol):
    """Reads the text of one choice as it comes."""

    def push(self, text: str) -> list[Piece]: ...

    def flush(self) -> list[Piece]:
        """The end has come: what was held back."""
        ...


class ToolProtocol(Protocol):
    """How one family of models speaks of tools."""

    name: str

    def render(self, messages: Sequence[Message], calls: Calls) -> Rendered:
        """No text of the client's can be taken for one of the protocol's marks."""
        ...

    def grammar(self, calls: Calls, *, continues: bool) -> str:
        """Lark for what may come. ``continues``: behind a `Rendered.prefix`."""
        ...

    def reader(self, *, continues: bool) -> Reader: ...


class Marks:
    """The texts that steer a protocol. They are ordinary text to the tokenizer, so clients' texts are kept from holding them."""

    def __init__(self, marks: Iterable[str]) -> None:
        self._pattern = re.compile(f"(?={'|'.join(map(re.escape, marks))})(.)")  # looks ahead, as marks may overlap

    def broken(self, text: str) -> str:
        """``text`` with every mark in it made another text, which looks the same: a zero-width space behind its first character."""
        return self._pattern.sub("\\1\u200b", text)

    def in_json(self, value: Any) -> Any:
        """The same for every text in a JSON value."""
        if isinstance(value, str):
            return self.broken(value)
        if isinstance(value, dict):
            return {self.broken(key): self.in_json(item) for key, item in value.items()}
        return [self.in_json(item) for item in value] if isinstance(value, list) else value


@dataclass(eq=False)
class ArgumentsScanner:
    """Finds where a JSON object ends, whatever its texts hold."""

    _depth: int = 0
    _in_text: bool = False
    _escaped: bool = False
    ended: bool = field(default=False)

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the object."""
        for at, character in enumerate(text):
            if self._in_text:
                self._read_text(character)
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.ended = True
                    return at + 1
        return len(text)

    def _read_text(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_text = False


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the end of ``text`` that could be the beginning of a mark, and of the white space before it."""
    longest = max(map(len, marks))
    partial = next(
        (k for k in range(min(longest - 1, len(text)), 0, -1) if any(mark.startswith(text[-k:]) for mark in marks)),
        0,
    )
    kept = text[: len(text) - partial].rstrip()
    return len(text) - len(kept)
