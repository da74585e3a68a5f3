"""A reader of calls that begin with a mark, whatever the protocol; what differs is told by a `Shape`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.request import ToolCallDelta
from serve.tools.protocol import ArgumentsScanner, Piece, held_back


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a protocol writes a call: mark, head with the name, arguments (a JSON object), tail."""

    mark: str
    head: re.Pattern[str]
    """From behind the mark up to the arguments; its group ``name``."""
    tail: re.Pattern[str] | None
    """Behind the arguments, where a protocol closes a call."""
    ends: Sequence[str]
    """Marks with which the answer is over."""
    lead: str = ""
    """What may stand at the very beginning and is no part of the answer."""


class CallReader:
    """A `Reader`."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._marks = (shape.mark, *shape.ends)
        self._text = ""
        self._read = self._read_lead if shape.lead else self._read_content
        self._scanner = ArgumentsScanner()
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while True:
            before = (self._read, len(self._text))
            pieces += self._read()
            if before == (self._read, len(self._text)):
                return pieces

    def flush(self) -> list[Piece]:
        held, self._text = self._text, ""
        return [Piece(content=held)] if held and self._read in (self._read_content, self._read_lead) else []

    def _read_lead(self) -> list[Piece]:
        lead = self._shape.lead
        if lead.startswith(self._text) and self._text != lead:
            return []
        self._text = self._text.removeprefix(lead) if self._text.startswith(lead) else self._text.removeprefix(lead.rstrip())
        self._read = self._read_content
        return []

    def _read_content(self) -> list[Piece]:
        found = min(((at, mark) for mark in self._marks if (at := self._text.find(mark)) >= 0), default=None)
        if found is not None:
            content = self._text[: found[0]].rstrip()
            self._text = self._text[found[0] + len(found[1]) :]
            self._read = self._read_head if found[1] == self._shape.mark else self._read_nothing
        else:
            keep = held_back(self._text, self._marks)
            content, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return [Piece(content=content)] if content else []

    def _read_head(self) -> list[Piece]:
        head = self._shape.head.match(self._text)
        if head is None:
            return []
        self._text, self._scanner, self._read = self._text[head.end() :], ArgumentsScanner(), self._read_arguments
        self._num_calls += 1
        return [Piece(call=ToolCallDelta(index=self._num_calls - 1, name=head["name"]))]

    def _read_arguments(self) -> list[Piece]:
        count = self._scanner.take(self._text)
        arguments, self._text = self._text[:count], self._text[count:]
        if self._scanner.ended:
            self._read = self._read_tail
        return [Piece(call=ToolCallDelta(index=self._num_calls - 1, arguments=arguments))] if arguments else []

    def _read_tail(self) -> list[Piece]:
        if self._shape.tail is not None:
            tail = self._shape.tail.match(self._text)
            if tail is None:
                return []
            self._text = self._text[tail.end() :]
        self._read = self._read_gap
        return []

    def _read_gap(self) -> list[Piece]:
        """White space behind a call is no content."""
        self._text = self._text.lstrip()
        if self._text:
            self._read = self._read_content
        return []

    def _read_nothing(self) -> list[Piece]:
        self._text = ""
        return []
