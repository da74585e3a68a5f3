"""Steps 1 and 14 of a request, over HTTP: /v1/responses, in the part that text needs. Nothing is stored: a conversation is sent whole."""

import itertools
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BeforeValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.places import mark
from serve.errors import InvalidRequest, NotSupported
from serve.http.connection import unless_gone
from serve.http.context import Front, Stamp
from serve.http.errors import json_response
from serve.http.openapi import takes
from serve.http.parts import wrong
from serve.http.schema import SharedBody
from serve.http.sse import open_stream
from serve.request import ChatRequest, Message, TextEvent, Usage

TEXT_TYPES = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
ITEM = {"type": "object", "properties": {"role": {"enum": [*ROLES]}, "content": {}}, "required": ["role", "content"]}
ASKS_FOR_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "auto", "none"),
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "reasoning": (None, {}),
    "include": (None, []),
    "truncation": (None, "disabled"),
    "text": (None, {}, {"format": {"type": "text"}}),
}
"""Fields that are not offered, with the values that ask for nothing."""
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("tools", "tool_choice"), "/v1/chat/completions takes function tools"),
    **dict.fromkeys(("previous_response_id", "conversation"), "nothing is stored: send the conversation so far as input"),
    "text": "/v1/chat/completions takes a response_format",
}


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    if not isinstance(given, list):
        raise wrong("should be text or a list of messages")
    return [_message(item) for item in given]


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or item.get("type", "message") != "message" or not _is_one_of(ROLES, item.get("role")):
        raise wrong("should hold messages only, each with a role (user, assistant, system, developer) and a content")
    content = item.get("content")
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        raise wrong("should hold text only: this model sees no images and reads no files")
    return Message(role=ROLES[item["role"]], content="\n".join(part["text"] for part in parts))


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and _is_one_of(TEXT_TYPES, part.get("type")) and isinstance(part.get("text"), str)


def _is_one_of(words: Container[str], said: Any) -> bool:
    return isinstance(said, str) and said in words  # what is no text need not be hashable


class ResponsesBody(SharedBody):
    """Body of /v1/responses."""

    input: Annotated[
        list[Message], BeforeValidator(_messages), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": ITEM}]})
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    reasoning: Any = None
    include: Any = None
    truncation: Any = None
    text: Any = None

    def length(self) -> int | None:
        return self.max_output_tokens

    def alternatives(self) -> int | None:
        return None

    def request(self, request_id: str) -> ChatRequest:
        for name, neutral in ASKS_FOR_NOTHING.items():
            if getattr(self, name) not in neutral:
                raise NotSupported(f"{name} is not offered here with such a value; {INSTEAD.get(name, 'leave it out')}", param=name)
        if self.n not in (None, 1):
            raise InvalidRequest("a response has one answer", param="n")
        first = () if self.instructions is None else (Message(role="system", content=self.instructions),)
        return ChatRequest(request_id=request_id, model=self.model, messages=(*first, *self.input), options=self.options())


def response_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", openapi_extra=takes(ResponsesBody))
    async def create_response(request: Request) -> Response:
        body, stamp, headers = await front.receive(request, ResponsesBody, id_prefix="resp")
        asked, service = stamp.sign(body.request(stamp.id)), front.service()
        writer = ResponseEvents(stamp, body)
        if body.stream:
            answer: Response = await open_stream(request.receive, service.chat(asked), writer, headers, tell_ledger=stamp.wants_ledger)
        else:
            result = await unless_gone(request.receive, service.collect(asked))
            (choice,) = result.choices
            whole = writer.response(choice.text, choice.finish_reason, result.usage)
            answer = json_response(whole, headers=headers | stamp.timing(result.ledger))
        mark(14, stamp.id)
        return answer

    return routes


class ResponseEvents:
    """A stream of ``response.*`` events around one message, and the response object that the last of them carries."""

    def __init__(self, stamp: Stamp, body: ResponsesBody) -> None:
        self._stamp, self._body = stamp, body
        self._text: list[str] = []
        self._finish_reason = ""
        self._numbers = itertools.count()
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return f"msg-{self._stamp.id}"

    def opening(self) -> Iterator[dict[str, Any]]:
        begun = self._object("in_progress", [], None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def of(self, event: TextEvent) -> dict[str, Any] | None:
        self._finish_reason = event.finish_reason or self._finish_reason
        if not event.text:
            return None
        self._text.append(event.text)
        return self._event("response.output_text.delta", **self._place, delta=event.text, logprobs=[])

    def closing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        whole = self.response("".join(self._text), self._finish_reason, usage)
        (item,) = whole["output"]
        (part,) = item["content"]
        yield self._event("response.output_text.done", **self._place, text=part["text"], logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def response(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The response object of a whole answer."""
        status = "incomplete" if finish_reason == "length" else "completed"
        return self._object(status, [self._item(status, [_part(text)])], usage)

    def _object(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._stamp.id,
            "object": "response",
            "created_at": self._stamp.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._stamp.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage and _usage(usage),
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
