"""Places 1 and 14 of a completion request over HTTP: POST /v1/completions."""

import codecs
from collections.abc import Iterable, Iterator
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
            response = json_response(text_completion(context, result, body), headers=headers)
        trace_place(14, context.id)
        return response

    return routes


def text_completion(context: RequestContext, result: Result, body: CompletionBody) -> dict[str, Any]:
    """The ``text_completion`` object."""
    with_logprobs = body.logprobs is not None
    choices = [
        {
            "index": choice.choice,
            "text": choice.text,
            "logprobs": _logprobs(choice.prompt_tokens, choice.tokens, TextOffsets(body)) if with_logprobs else None,
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
        self._body = body
        self._offsets: dict[int, TextOffsets] = {}
        """Of each choice."""

    def start(self) -> tuple[dict[str, Any], ...]:
        return ()

    def event(self, event: TextEvent) -> tuple[dict[str, Any], ...]:
        has_logprobs = self._with_logprobs and bool(event.prompt_tokens or event.tokens)
        if not (event.text or event.finish_reason or has_logprobs):
            return ()
        choice: dict[str, Any] = {"index": event.choice, "text": event.text, "logprobs": None, "finish_reason": event.finish_reason}
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if has_logprobs:
            offsets = self._offsets.setdefault(event.choice, TextOffsets(self._body))
            choice["logprobs"] = _logprobs(event.prompt_tokens, event.tokens, offsets)
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


class TextOffsets:
    """Where in a choice's text its tokens begin, in characters. A token that begins within a character has that character's place.

    "Hel" "lo" "!":  0 3 5
    """

    def __init__(self, body: CompletionBody) -> None:
        self._echoes_control_tokens = isinstance(body.prompt[0], str)  # the client's own text is echoed as it is
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, tokens: Iterable[TextToken]) -> list[int]:
        """Of all tokens of the prompt. The answer's text does not continue a character of the prompt's."""
        offsets = [self._take(token, shows=token.of_text or self._echoes_control_tokens) for token in tokens]
        self._at += len(self._decoder.decode(b"", final=True))
        return offsets

    def of_answer(self, tokens: Iterable[TextToken]) -> list[int]:
        """Of the next tokens of the answer."""
        return [self._take(token, shows=token.of_text) for token in tokens]

    def _take(self, token: TextToken, *, shows: bool) -> int:
        if not shows:
            return self._at
        self._at += len(self._decoder.decode(token.raw[:1]))
        is_whole_character = bool(token.raw) and not self._decoder.getstate()[0]
        offset = self._at - is_whole_character
        self._at += len(self._decoder.decode(token.raw[1:]))
        return offset


def _logprobs(prompt: tuple[TextToken, ...], answer: tuple[TextToken, ...], offsets: TextOffsets) -> dict[str, list[Any]]:
    """The parallel lists of the older API. A prompt's first token has null log-probabilities."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    columns["text_offset"] = (offsets.of_prompt(prompt) if prompt else []) + offsets.of_answer(answer)
    for token in (*prompt, *answer):
        scored = token.logprobs
        columns["tokens"].append(token.text)
        columns["token_logprobs"].append(scored and scored.logprob)
        columns["top_logprobs"].append(scored and _top_logprobs(token, scored.logprob))
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
