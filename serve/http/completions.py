"""Places 1 and 14 of a completion request over HTTP: POST /v1/completions."""

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
from serve.http.schema import CompletionBody
from serve.http.sse import open_stream
from serve.request import Result, TextEvent, TextToken, Usage


def completion_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=json_body(CompletionBody))
    async def create_completion(request: Request) -> Response:
        body, context, headers = await api.receive(request, CompletionBody, id_prefix="cmpl-")
        completion, service = context.apply_to(body.request(context.id)), api.service()
        response: Response
        if body.stream:
            stream_format = CompletionStreamFormat(context, body)
            response = await open_stream(
                request.receive, service.complete(completion), stream_format, headers, include_timing=context.wants_timing
            )
        else:
            result = await cancel_on_disconnect(request.receive, service.collect(completion))
            headers |= hold_headers(result.held_s) | context.timing_headers(result.timing)
            response = json_response(text_completion(context, result, with_logprobs=body.logprobs is not None), headers=headers)
        trace_place(14, context.id)
        return response

    return routes


def text_completion(context: RequestContext, result: Result, *, with_logprobs: bool) -> dict[str, Any]:
    """The ``text_completion`` object."""
    choices = [
        {
            "index": choice.choice,
            "text": choice.text,
            "logprobs": _logprobs((*choice.prompt_tokens, *choice.tokens), 0) if with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        for choice in result.choices
    ]
    return context.response_object("text_completion", choices=choices, usage=usage_object(result.usage))


class CompletionStreamFormat:
    """A stream of ``text_completion`` objects, at the end the usage if it is wanted. See `serve.http.sse.StreamFormat`."""

    def __init__(self, context: RequestContext, body: CompletionBody) -> None:
        self._context, self._with_logprobs = context, body.logprobs is not None
        self._with_usage, self._with_running_usage = body.wants_usage, body.wants_running_usage
        self._offsets: dict[int, int] = {}
        """Characters of each choice's tokens so far, for ``text_offset``."""

    def start(self) -> tuple[dict[str, Any], ...]:
        return ()

    def event(self, event: TextEvent) -> tuple[dict[str, Any], ...]:
        tokens = (*event.prompt_tokens, *event.tokens)
        has_logprobs = self._with_logprobs and bool(tokens)
        if not (event.text or event.finish_reason or has_logprobs):
            return ()
        choice: dict[str, Any] = {"index": event.choice, "text": event.text, "logprobs": None, "finish_reason": event.finish_reason}
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if has_logprobs:
            start = self._offsets.get(event.choice, 0)
            choice["logprobs"] = _logprobs(tokens, start)
            self._offsets[event.choice] = start + sum(len(token.text) for token in tokens)
        return (self._chunk([choice], event.usage_so_far if self._with_running_usage else None),)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        if self._with_usage:
            yield self._chunk([], usage)

    def error(self, error: ErrorBody) -> Iterator[dict[str, Any]]:
        yield error_object(error)

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = self._context.response_object("text_completion", choices=choices)
        if self._with_usage:
            chunk["usage"] = usage and usage_object(usage)
        return chunk


def _logprobs(tokens: tuple[TextToken, ...], start: int) -> dict[str, list[Any]]:
    """The parallel lists of the older API. A prompt's first token has null log-probabilities.

    start=0, tokens "Hel" "lo" "!":  text_offset 0 3 5
    """
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        scored = token.logprobs
        columns["tokens"].append(token.text)
        columns["token_logprobs"].append(scored and scored.logprob)
        columns["top_logprobs"].append(scored and _top_logprobs(token, scored.logprob))
        columns["text_offset"].append(start)
        start += len(token.text)
    return columns


def _top_logprobs(token: TextToken, logprob: float) -> dict[str, float]:
    """Log-probability by text, of the alternatives and (as OpenAI's reference has it) of the token itself.

    If several tokens show as the same text, because their bytes are not whole characters, the most probable one counts.
    """
    found: dict[str, float] = {}
    for _, text, _, alternative in token.top:
        found.setdefault(text, alternative)
    found.setdefault(token.text, logprob)
    return found
