"""Place 14 of a request to /v1/responses: the output items while they are written, and their events."""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from serve.http.token_objects import token_objects
from serve.request import TextToken, ToolCallDelta

Event = tuple[str, dict[str, Any]]
"""Type and fields, without the two that every event has (`type`, `sequence_number`)."""


class Item(Protocol):
    """An output item that is being written."""

    def begin(self) -> Iterator[Event]: ...
    def end(self, status: str) -> Iterator[Event]: ...
    def object(self, status: str) -> dict[str, Any]:
        """The item's object, with what has been written so far."""
        ...


class MessageItem:
    """A message with one text part."""

    def __init__(self, item_id: str, index: int, *, with_logprobs: bool) -> None:
        self._id, self._with_logprobs = item_id, with_logprobs
        self._at = {"output_index": index, "item_id": item_id, "content_index": 0}
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._tokens = TokensOfText()

    def begin(self) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": self._at["output_index"], "item": self._object("in_progress", [])}
        yield "response.content_part.added", self._at | {"part": self._part()}

    def add_text(self, text: str, tokens: Iterable[TextToken]) -> Iterator[Event]:
        self._text.append(text)
        logprobs = token_objects(self._tokens.take(text, tokens)) if self._with_logprobs else []
        self._logprobs += logprobs
        yield "response.output_text.delta", self._at | {"delta": text, "logprobs": logprobs}

    def end(self, status: str) -> Iterator[Event]:
        part = self._part()
        yield "response.output_text.done", self._at | {"text": part["text"], "logprobs": self._logprobs}
        yield "response.content_part.done", self._at | {"part": part}
        yield "response.output_item.done", {"output_index": self._at["output_index"], "item": self._object(status, [part])}

    def object(self, status: str) -> dict[str, Any]:
        return self._object(status, [self._part()])

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "".join(self._text), "annotations": [], "logprobs": self._logprobs}

    def _object(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}


class CallItem:
    """A function call that the client is asked to make."""

    def __init__(self, item_id: str, index: int, call: ToolCallDelta) -> None:
        self._id, self._call_id, self._name = item_id, call.id, call.name
        self._at = {"output_index": index, "item_id": item_id}
        self._arguments: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": self._at["output_index"], "item": self.object("in_progress")}

    def add_arguments(self, arguments: str) -> Iterator[Event]:
        if arguments:
            self._arguments.append(arguments)
            yield "response.function_call_arguments.delta", self._at | {"delta": arguments}

    def end(self, status: str) -> Iterator[Event]:
        item = self.object(status)
        yield "response.function_call_arguments.done", self._at | {"name": self._name, "arguments": item["arguments"]}
        yield "response.output_item.done", {"output_index": self._at["output_index"], "item": item}

    def object(self, status: str) -> dict[str, Any]:
        arguments = "".join(self._arguments)
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": arguments,
        }


class TokensOfText:
    """Finds the tokens that make up the text, as opposed to control tokens, the end of sequence, stop strings and markers of calls."""

    def __init__(self) -> None:
        self._waiting: deque[TextToken] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        """Decodes as the text was decoded, so that invalid bytes count as the U+FFFD that the text has for them."""
        self._missing_chars = 0
        """Characters of the text that the tokens returned so far do not cover."""

    def take(self, text: str, tokens: Iterable[TextToken]) -> list[TextToken]:
        """Adds text and tokens, and returns the tokens of that text. Text never comes before its tokens."""
        self._waiting.extend(token for token in tokens if token.of_text)
        self._missing_chars += len(text)
        found: list[TextToken] = []
        while self._waiting and self._missing_chars > 0:
            found.append(self._waiting.popleft())
            self._missing_chars -= len(self._decoder.decode(found[-1].raw))
        return found
