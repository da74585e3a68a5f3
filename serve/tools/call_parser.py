"""A streaming parser of tool calls that begin with a marker. What differs between protocols is in a `CallSyntax`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.request import ToolCallDelta
from serve.tools.protocol import ArgumentsScanner, ParsedPiece, length_held_back


@dataclass(frozen=True, kw_only=True)
class CallSyntax:
    """How a protocol writes a call: marker, head with the name, arguments (a JSON object), tail."""

    marker: str
    head: re.Pattern[str]
    """Matches from after the marker up to the arguments; the group ``name`` is the function's."""
    tail: re.Pattern[str] | None
    """Matches what follows the arguments, in protocols that close a call."""
    ends: Sequence[str]
    """Markers that end the answer."""
    lead: str = ""
    """Text that may come first and is not part of the answer."""


class MarkerCallParser:
    """A `ToolCallParser`: a state machine, whose state is the `_read_*` method that takes the next text."""

    def __init__(self, syntax: CallSyntax, *, calls_come_first: bool = False) -> None:
        """``calls_come_first``: see `serve.tools.protocol.ToolProtocol.parser`."""
        self._syntax = syntax
        self._markers = (syntax.marker, *syntax.ends)
        self._text = ""
        self._read_between_calls = self._read_start if calls_come_first else self._read_content
        self._read = self._read_lead if syntax.lead else self._read_between_calls
        self._scanner = ArgumentsScanner()
        self._num_calls = 0

    def push(self, text: str) -> list[ParsedPiece]:
        self._text += text
        pieces: list[ParsedPiece] = []
        while True:
            before = (self._read, len(self._text))
            pieces += self._read()
            if before == (self._read, len(self._text)):
                return pieces

    def flush(self) -> list[ParsedPiece]:
        rest, self._text = self._text, ""
        shown = (self._read_lead, self._read_start, self._read_content, self._read_text)
        return [ParsedPiece(content=rest)] if rest and self._read in shown else []

    @property
    def in_arguments(self) -> bool:
        return self._read == self._read_arguments

    def _read_lead(self) -> list[ParsedPiece]:
        lead = self._syntax.lead
        if lead.startswith(self._text) and self._text != lead:
            return []
        self._text = self._text.removeprefix(lead) if self._text.startswith(lead) else self._text.removeprefix(lead.rstrip())
        self._read = self._read_between_calls
        return []

    def _read_start(self) -> list[ParsedPiece]:
        """As `_read_content`, where a marker counts only if the text begins with it."""
        if any(map(self._text.startswith, self._markers)):
            return self._read_content()
        if not any(marker.startswith(self._text) for marker in self._markers):
            self._read = self._read_text
        return []

    def _read_text(self) -> list[ParsedPiece]:
        content, self._text = self._text, ""
        return [ParsedPiece(content=content)] if content else []

    def _read_content(self) -> list[ParsedPiece]:
        found = min(((at, marker) for marker in self._markers if (at := self._text.find(marker)) >= 0), default=None)
        if found is not None:
            content = self._text[: found[0]].rstrip()
            self._text = self._text[found[0] + len(found[1]) :]
            self._read = self._read_head if found[1] == self._syntax.marker else self._read_nothing
        else:
            keep = length_held_back(self._text, self._markers)
            content, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return [ParsedPiece(content=content)] if content else []

    def _read_head(self) -> list[ParsedPiece]:
        head = self._syntax.head.match(self._text)
        if head is None:
            return []
        self._text, self._scanner, self._read = self._text[head.end() :], ArgumentsScanner(), self._read_arguments
        self._num_calls += 1
        return [ParsedPiece(call=ToolCallDelta(index=self._num_calls - 1, name=head["name"]))]

    def _read_arguments(self) -> list[ParsedPiece]:
        count = self._scanner.take(self._text)
        arguments, self._text = self._text[:count], self._text[count:]
        if self._scanner.ended:
            self._read = self._read_tail
        return [ParsedPiece(call=ToolCallDelta(index=self._num_calls - 1, arguments=arguments))] if arguments else []

    def _read_tail(self) -> list[ParsedPiece]:
        if self._syntax.tail is not None:
            tail = self._syntax.tail.match(self._text)
            if tail is None:
                return []
            self._text = self._text[tail.end() :]
        self._read = self._read_gap
        return []

    def _read_gap(self) -> list[ParsedPiece]:
        """White space after a call is not content."""
        self._text = self._text.lstrip()
        if self._text:
            self._read = self._read_between_calls
        return []

    def _read_nothing(self) -> list[ParsedPiece]:
        self._text = ""
        return []
