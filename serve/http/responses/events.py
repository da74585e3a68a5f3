"""Place 14 of a request to /v1/responses: the stream of ``response.*`` events, and the response object in the last of them."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from model.generation_config import GenerationDefaults
from serve.errors import ErrorBody
from serve.http.context import RequestContext
from serve.http.errors import error_object
from serve.http.responses.output import CallItem, Event, Item, MessageItem
from serve.http.responses.schema import ResponsesBody
from serve.request import Result, TextEvent, ToolCallDelta, Usage

FAILURES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}
"""OpenAI's code for a failed response, by the type of our error; all others are "server_error"."""


class ResponsesStreamFormat:
    """See `serve.http.sse.StreamFormat`. An unstreamed response is the last object of a stream whose other events are not sent."""

    def __init__(self, context: RequestContext, body: ResponsesBody, defaults: GenerationDefaults) -> None:
        self._context, self._body, self._defaults = context, body, defaults
        self._numbers = itertools.count()
        self._done: list[dict[str, Any]] = []
        """Items that are complete."""
        self._open: Item | None = None
        """The item that is being written."""
        self._finish_reason = ""

    def whole(self, result: Result) -> dict[str, Any]:
        """The response object."""
        (choice,) = result.choices
        calls = tuple(
            ToolCallDelta(index=at, id=call.id, name=call.name, arguments=call.arguments) for at, call in enumerate(choice.tool_calls)
        )
        event = TextEvent(choice=0, text=choice.text, tokens=choice.tokens, tool_calls=calls, finish_reason=choice.finish_reason)
        *_, last = itertools.chain(self.event(event), self.end(result.usage))
        response: dict[str, Any] = last["response"]
        return response

    def start(self) -> Iterator[dict[str, Any]]:
        response = self._object("in_progress", [], None)
        yield self._numbered(("response.created", {"response": response}))
        yield self._numbered(("response.in_progress", {"response": response}))

    def event(self, event: TextEvent) -> Iterator[dict[str, Any]]:
        self._finish_reason = event.finish_reason or self._finish_reason
        return map(self._numbered, self._item_events(event))

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        status = "incomplete" if self._finish_reason == "length" else "completed"
        yield from map(self._numbered, self._finish(status))
        yield self._numbered((f"response.{status}", {"response": self._object(status, self._done, usage)}))

    def error(self, error: ErrorBody) -> Iterator[dict[str, Any]]:
        """Has the flat fields that OpenAI documents, and the ``error`` object that OpenAI sends and its libraries raise."""
        yield self._numbered(("error", {"code": error.code, "message": error.message, "param": error.param, **error_object(error)}))
        output = self._done + ([self._open.object("incomplete")] if self._open is not None else [])
        failure = {"code": FAILURES.get(error.type, "server_error"), "message": error.message}
        yield self._numbered(("response.failed", {"response": self._object("failed", output, None) | {"error": failure}}))

    def _item_events(self, event: TextEvent) -> Iterator[Event]:
        if event.text:
            message = self._open
            if not isinstance(message, MessageItem):
                message = MessageItem(self._id("msg"), self._index(), with_logprobs=self._body.wants_logprobs)
                yield from self._begin(message)
            yield from message.add_text(event.text, event.tokens)
        for call in event.tool_calls:
            if call.name is not None:
                yield from self._begin(CallItem(self._id("fc"), self._index(), call))
            assert isinstance(self._open, CallItem)
            yield from self._open.add_arguments(call.arguments)

    def _begin(self, item: Item) -> Iterator[Event]:
        """Completes the item before: only one item is open at a time."""
        yield from self._close("completed")
        self._open = item
        yield from item.begin()

    def _finish(self, status: str) -> Iterator[Event]:
        """An empty answer becomes one empty message."""
        if not self._done and self._open is None:
            yield from self._begin(MessageItem(self._id("msg"), 0, with_logprobs=False))
        yield from self._close(status)

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end(status)
            self._done.append(self._open.object(status))
            self._open = None

    def _index(self) -> int:
        """The index of the next item."""
        return len(self._done) + (self._open is not None)

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._context.id.rpartition('_')[2]}{self._index():02x}"

    def _numbered(self, event: Event) -> dict[str, Any]:
        kind, fields = event
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _object(self, status: str, output: Iterable[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        """The response object, with all fields that Open Responses requires (they are OpenAI's)."""
        body, defaults = self._body, self._defaults
        return {
            "id": self._context.id,
            "object": "response",
            "created_at": self._context.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._context.model,
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
            "tools": [tool.response_object() for tool in body.functions.values()],
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "usage": usage and _usage(usage),
            "user": body.user,
        }


def _first(requested: float | None, recommended: float | None, default: float) -> float:
    return requested if requested is not None else recommended if recommended is not None else default


def _format(body: ResponsesBody) -> dict[str, Any]:
    requested = body.text.format if body.text is not None and body.text.format is not None else {"type": "text"}
    if requested.get("type") != "json_schema":
        return {"type": requested.get("type")}
    fields = {key: requested.get(key) for key in ("type", "name", "description", "schema")}
    return fields | {"strict": requested.get("strict") is not False}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
