"""Steps 1 and 14 of a completion request, over HTTP: /v1/completions."""

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
from serve.http.schema import CompletionBody
from serve.http.sse import open_stream
from serve.request import Result, TextEvent, TextToken, Usage


def completion_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=takes(CompletionBody))
    async def create_completion(request: Request) -> Response:
        body, stamp, headers = await front.receive(request, CompletionBody, id_prefix="cmpl-")
        asked, service = stamp.sign(body.request(stamp.id)), front.service()
        if body.stream:
            answer: Response = await open_stream(
                request.receive, service.complete(asked), CompletionChunks(stamp, body), headers, tell_ledger=stamp.wants_ledger
            )
        else:
            result = await unless_gone(request.receive, service.collect(asked))
            headers |= held_headers(result.held_s)
            answer = json_response(
                completion(stamp, result, with_logprobs=body.logprobs is not None), headers=headers | stamp.timing(result.ledger)
            )
        trace_place(14, stamp.id)
        return answer

    return routes


def completion(stamp: Stamp, result: Result, *, with_logprobs: bool) -> dict[str, Any]:
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
    return stamp.piece("text_completion", choices=choices, usage=usage_object(result.usage))


class CompletionChunks:
    """A stream of ``text_completion`` pieces, in the end the usage if asked for."""

    def __init__(self, stamp: Stamp, body: CompletionBody) -> None:
        self._stamp, self._logprobs = stamp, body.logprobs is not None
        self._usage, self._running_usage = body.wants_usage, body.wants_running_usage
        self._offsets: dict[int, int] = {}
        """Characters of each choice's tokens so far, for ``text_offset``."""

    def opening(self) -> tuple[dict[str, Any], ...]:
        return ()

    def of(self, event: TextEvent) -> tuple[dict[str, Any], ...]:
        tokens = (*event.prompt_tokens, *event.tokens)
        if not (event.text or event.finish_reason or (self._logprobs and tokens)):
            return ()
        part: dict[str, Any] = {"index": event.choice, "text": event.text, "logprobs": None, "finish_reason": event.finish_reason}
        if event.finish_reason:
            part["stop_reason"] = event.stop_reason
        if self._logprobs and tokens:
            start = self._offsets.get(event.choice, 0)
            part["logprobs"] = _logprobs(tokens, start)
            self._offsets[event.choice] = start + sum(len(token.text) for token in tokens)
        return (self._chunk([part], event.usage_so_far if self._running_usage else None),)

    def closing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        if self._usage:
            yield self._chunk([], usage)

    def failing(self, error: ErrorBody) -> tuple[dict[str, Any], ...]:
        return (error_object(error),)

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = self._stamp.piece("text_completion", choices=choices)
        if self._usage:
            chunk["usage"] = usage and usage_object(usage)
        return chunk


def _by_text(token: TextToken, logprob: float) -> dict[str, float]:
    """Alternatives, and the token itself. Of several that show as the same text (bytes that are no character) the most probable."""
    found: dict[str, float] = {}
    for _, text, _, of_it in token.top:
        found.setdefault(text, of_it)
    found.setdefault(token.text, logprob)
    return found


def _logprobs(tokens: tuple[TextToken, ...], start: int) -> dict[str, list[Any]]:
    """The older API's parallel lists. ``top_logprobs`` holds the token itself too, as OpenAI's reference has it; a prompt's first
    token has null in both.

    start=0, tokens "Hel" "lo" "!":  text_offset 0 3 5
    """
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        told = token.logprobs
        columns["tokens"].append(token.text)
        columns["token_logprobs"].append(told and told.logprob)
        columns["top_logprobs"].append(told and _by_text(token, told.logprob))
        columns["text_offset"].append(start)
        start += len(token.text)
    return columns
