"""Step 14 of a request to /v1/responses: a stream of ``response.*`` events, and the response object that the last of them carries."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from model.generation_config import GenerationDefaults
from serve.errors import ErrorBody
from serve.http.context import Stamp
from serve.http.errors import error_object
from serve.http.responses.output import CallItem, Event, Item, MessageItem
from serve.http.responses.schema import ResponsesBody
from serve.request import Result, TextEvent, ToolCallDelta, Usage

FAILURES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}
"""What OpenAI calls a response's failure, by our errors' type; all else is a "server_error"."""


class ResponseEvents:
    """How this API writes an answer; see `serve.http.sse.Chunks`. A whole answer is a stream of which the end alone is sent."""

    def __init__(self, stamp: Stamp, body: ResponsesBody, defaults: GenerationDefaults) -> None:
        self._stamp, self._body, self._defaults = stamp, body, defaults
        self._numbers = itertools.count()
        self._done: list[dict[str, Any]] = []
        self._open: Item | None = None
        self._finish_reason = ""

    def whole(self, result: Result) -> dict[str, Any]:
        """The response object."""
        (choice,) = result.choices
        calls = tuple(
            ToolCallDelta(index=at, id=call.id, name=call.name, arguments=call.arguments) for at, call in enumerate(choice.tool_calls)
        )
        event = TextEvent(choice=0, text=choice.text, tokens=choice.tokens, tool_calls=calls, finish_reason=choice.finish_reason)
        *_, last = itertools.chain(self.of(event), self.closing(result.usage))
        response: dict[str, Any] = last["response"]
        return response

    def opening(self) -> Iterator[dict[str, Any]]:
        begun = self._object("in_progress", [], None)
        yield self._numbered(("response.created", {"response": begun}))
        yield self._numbered(("response.in_progress", {"response": begun}))

    def of(self, event: TextEvent) -> Iterator[dict[str, Any]]:
        self._finish_reason = event.finish_reason or self._finish_reason
        return map(self._numbered, self._told(event))

    def closing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        status = "incomplete" if self._finish_reason == "length" else "completed"
        yield from map(self._numbered, self._ended(status))
        yield self._numbered((f"response.{status}", {"response": self._object(status, self._done, usage)}))

    def failing(self, error: ErrorBody) -> Iterator[dict[str, Any]]:
        """Flat as OpenAI documents an error's event, and with the object that OpenAI sends and its libraries raise."""
        told = error_object(error)
        yield self._numbered(("error", {"code": error.code, "message": error.message, "param": error.param, **told}))
        output = self._done + ([self._open.object("incomplete")] if self._open is not None else [])
        failure = {"code": FAILURES.get(error.type, "server_error"), "message": error.message}
        yield self._numbered(("response.failed", {"response": self._object("failed", output, None) | {"error": failure}}))

    def _told(self, event: TextEvent) -> Iterator[Event]:
        if event.text:
            message = self._open
            if not isinstance(message, MessageItem):
                message = MessageItem(self._id("msg"), self._index(), with_logprobs=self._body.wants_logprobs)
                yield from self._begun(message)
            yield from message.say(event.text, event.tokens)
        for call in event.tool_calls:
            if call.name is not None:
                yield from self._begun(CallItem(self._id("fc"), self._index(), call))
            assert isinstance(self._open, CallItem)
            yield from self._open.more(call.arguments)

    def _begun(self, item: Item) -> Iterator[Event]:
        """Items come one after the other."""
        yield from self._closed("completed")
        self._open = item
        yield from item.begin()

    def _ended(self, status: str) -> Iterator[Event]:
        """An answer of nothing is a message of nothing."""
        if not self._done and self._open is None:
            yield from self._begun(MessageItem(self._id("msg"), 0, with_logprobs=False))
        yield from self._closed(status)

    def _closed(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end(status)
            self._done.append(self._open.object(status))
            self._open = None

    def _index(self) -> int:
        """Of an item that comes next."""
        return len(self._done) + (self._open is not None)

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._stamp.id.rpartition('_')[2]}{self._index():02x}"

    def _numbered(self, event: Event) -> dict[str, Any]:
        kind, fields = event
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _object(self, status: str, output: Iterable[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        """Fields are those that Open Responses requires, which are OpenAI's."""
        body, defaults = self._body, self._defaults
        return {
            "id": self._stamp.id,
            "object": "response",
            "created_at": self._stamp.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._stamp.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": _first(body.temperature, defaults.temperature, 1.0),
            "top_p": _first(body.top_p, defaults.top_p or None, 1.0),
            "presence_penalty": _first(body.presence_penalty, None, 0.0),
            "frequency_penalty": _first(body.frequency_penalty, None, 0.0),
            "text": {"format": _format(body), "verbosity": "medium"},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [tool.told() for tool in body.functions.values()],
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "usage": usage and _usage(usage),
            "user": body.user,
        }


def _first(said: float | None, recommended: float | None, otherwise: float) -> float:
    return said if said is not None else recommended if recommended is not None else otherwise


def _format(body: ResponsesBody) -> dict[str, Any]:
    said = body.text.format if body.text is not None and body.text.format is not None else {"type": "text"}
    if said.get("type") != "json_schema":
        return {"type": said.get("type")}
    told = {key: said.get(key) for key in ("type", "name", "description", "schema")}
    return told | {"strict": said.get("strict") is not False}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
