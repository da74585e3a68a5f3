"""Steps 1 and 14 of a chat request, over HTTP: /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.errors import ErrorBody
from serve.hold_header import held_headers
from serve.http.context import Front, Stamp, usage_object
from serve.http.disconnect import unless_gone
from serve.http.errors import error_object, json_response
from serve.http.openapi import takes
from serve.http.schema import ChatBody
from serve.http.sse import open_stream
from serve.http.token_objects import token_objects
from serve.request import ChoiceResult, Result, TextEvent, TextToken, ToolCallDelta, Usage


def chat_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=takes(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        body, stamp, headers = await front.receive(request, ChatBody, id_prefix="chatcmpl-")
        asked, service = stamp.sign(body.request(stamp.id)), front.service()
        if body.stream:
            answer: Response = await open_stream(
                request.receive, service.chat(asked), ChatChunks(stamp, body), headers, tell_ledger=stamp.wants_ledger
            )
        else:
            result = await unless_gone(request.receive, service.collect(asked))
            headers |= held_headers(result.held_s)
            answer = json_response(
                chat_completion(stamp, result, with_logprobs=bool(body.logprobs)), headers=headers | stamp.timing(result.ledger)
            )
        trace_place(14, stamp.id)
        return answer

    return routes


def chat_completion(stamp: Stamp, result: Result, *, with_logprobs: bool) -> dict[str, Any]:
    choices = [_choice(choice, with_logprobs) for choice in result.choices]
    return stamp.piece("chat.completion", choices=choices, usage=usage_object(result.usage))


def _choice(choice: ChoiceResult, with_logprobs: bool) -> dict[str, Any]:
    return {
        "index": choice.choice,
        "message": _message(choice),
        "logprobs": _logprobs(choice.tokens) if with_logprobs else None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _message(choice: ChoiceResult) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in choice.tool_calls
        ]
    return message


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """The first of a call brings its id and name, all bring pieces of its arguments."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatChunks:
    """A stream of ``chat.completion.chunk``: each choice's role first, then its text, in the end the usage if asked for."""

    def __init__(self, stamp: Stamp, body: ChatBody) -> None:
        self._stamp, self._choices, self._logprobs = stamp, body.n or 1, bool(body.logprobs)
        self._usage, self._running_usage = body.wants_usage, body.wants_running_usage

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in range(self._choices):
            yield self._chunk([self._part(choice, {"role": "assistant", "content": ""})])

    def of(self, event: TextEvent) -> tuple[dict[str, Any], ...]:
        if not (event.text or event.tool_calls or event.finish_reason or (self._logprobs and event.tokens)):
            return ()
        part = self._part(event.choice, {"content": event.text} if event.text else {})
        if event.tool_calls:
            part["delta"]["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
        part["finish_reason"] = event.finish_reason
        if event.finish_reason:
            part["stop_reason"] = event.stop_reason
        if self._logprobs and event.tokens:
            part["logprobs"] = _logprobs(event.tokens)
        return (self._chunk([part], event.usage_so_far if self._running_usage else None),)

    def closing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        if self._usage:
            yield self._chunk([], usage)

    def failing(self, error: ErrorBody) -> tuple[dict[str, Any], ...]:
        return (error_object(error),)

    def _part(self, choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = self._stamp.piece("chat.completion.chunk", choices=choices)
        if self._usage:  # OpenAI: every chunk has the field then, null but in the last
            chunk["usage"] = usage and usage_object(usage)
        return chunk


def _logprobs(tokens: tuple[TextToken, ...]) -> dict[str, Any]:
    return {"content": token_objects(tokens), "refusal": None}
