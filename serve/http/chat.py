"""Places 1 and 14 of a chat request over HTTP: POST /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.errors import ErrorBody
from serve.hold_header import hold_headers
from serve.http.context import HttpApi, RequestContext, usage_object
from serve.http.disconnect import cancel_on_disconnect
from serve.http.errors import error_object, json_response
from serve.http.openapi import json_body
from serve.http.schema import ChatBody
from serve.http.sse import open_stream
from serve.http.token_objects import token_objects
from serve.request import ChoiceResult, Result, TextEvent, TextToken, ToolCallDelta, Usage


def chat_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=json_body(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        body, context, headers = await api.receive(request, ChatBody, id_prefix="chatcmpl-")
        chat, service = context.apply_to(body.request(context.id)), api.service()
        response: Response
        if body.stream:
            stream_format = ChatStreamFormat(context, body)
            response = await open_stream(request.receive, service.chat(chat), stream_format, headers, include_timing=context.wants_timing)
        else:
            result = await cancel_on_disconnect(request.receive, service.collect(chat))
            headers |= hold_headers(result.held_s) | context.timing_headers(result.timing)
            response = json_response(chat_completion(context, result, with_logprobs=bool(body.logprobs)), headers=headers)
        trace_place(14, context.id)
        return response

    return routes


def chat_completion(context: RequestContext, result: Result, *, with_logprobs: bool) -> dict[str, Any]:
    """The ``chat.completion`` object."""
    choices = [_choice(choice, with_logprobs) for choice in result.choices]
    return context.response_object("chat.completion", choices=choices, usage=usage_object(result.usage))


class ChatStreamFormat:
    """A stream of ``chat.completion.chunk`` objects: each choice's role, then its text, then the usage if it is wanted.

    See `serve.http.sse.StreamFormat`.
    """

    def __init__(self, context: RequestContext, body: ChatBody) -> None:
        self._context, self._num_choices, self._with_logprobs = context, body.n or 1, bool(body.logprobs)
        self._with_usage, self._with_running_usage = body.wants_usage, body.wants_running_usage

    def start(self) -> Iterator[dict[str, Any]]:
        for choice in range(self._num_choices):
            yield self._chunk([_chunk_choice(choice, {"role": "assistant", "content": ""})])

    def event(self, event: TextEvent) -> tuple[dict[str, Any], ...]:
        has_logprobs = self._with_logprobs and bool(event.tokens)
        if not (event.text or event.tool_calls or event.finish_reason or has_logprobs):
            return ()
        choice = _chunk_choice(event.choice, {"content": event.text} if event.text else {})
        if event.tool_calls:
            choice["delta"]["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
        choice["finish_reason"] = event.finish_reason
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if has_logprobs:
            choice["logprobs"] = _logprobs(event.tokens)
        return (self._chunk([choice], event.usage_so_far if self._with_running_usage else None),)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        if self._with_usage:
            yield self._chunk([], usage)

    def error(self, error: ErrorBody) -> Iterator[dict[str, Any]]:
        yield error_object(error)

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = self._context.response_object("chat.completion.chunk", choices=choices)
        if self._with_usage:  # as OpenAI has it: then every chunk has the field, and it is null in all but the last
            chunk["usage"] = usage and usage_object(usage)
        return chunk


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


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """Only the first delta of a call has its id and name; every delta has a part of its arguments."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(tokens: tuple[TextToken, ...]) -> dict[str, Any]:
    return {"content": token_objects(tokens), "refusal": None}
