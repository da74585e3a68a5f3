"""What all routes share: how a request is received, and what is known of it from then on."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from engine.request_trace import trace_place
from serve.caller import Caller
from serve.errors import InvalidRequest
from serve.http.auth import caller_of
from serve.http.body import read_json_object
from serve.http.headers import deadline_ms, priority, wants_timing
from serve.http.schema import ModelBody, ignored_fields, parse
from serve.idempotency import IDEMPOTENCY_KEY, parse_idempotency_key
from serve.limits import Limits, is_identifier
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, Usage
from serve.request_timing import RequestTiming
from serve.service_api import ServiceApi
from serve.session import SESSION_HEADER, parse_session_id
from serve.trace_context import extract_trace

IGNORED_FIELDS_HEADER = "x-manta-ignored-fields"

B = TypeVar("B", bound=ModelBody)
R = TypeVar("R", ChatRequest, CompletionRequest, EmbeddingRequest)


@dataclass(frozen=True, kw_only=True)
class HttpApi:
    """What all HTTP routes share: the service, the limits, and how a request is received."""

    service: Callable[[], ServiceApi]
    """Called for each request: the service is made after the routes, in the process that serves."""
    limits: Limits
    strict: bool = False
    """Refuse a field that has no effect here, instead of naming it in a response header."""

    async def receive(self, request: Request, kind: type[B], *, id_prefix: str) -> tuple[B, "RequestContext", dict[str, str]]:
        """The body, the context, and headers for the response. ``id_prefix``: of the request's id.

        Raises:
            ServeError: see `read_json_object` and `parse`.
        """
        arrived_s, request_id = time.monotonic(), f"{id_prefix}{uuid.uuid4().hex}"
        trace_place(1, request_id)
        fields = await read_json_object(request, self.limits)
        body = parse(kind, fields, self.limits)
        if body.user is not None and not is_identifier(body.user, self.limits):
            raise InvalidRequest(f"user must be 1 to {self.limits.id_chars} of A-Z a-z 0-9 . _ : -", param="user")
        session = parse_session_id(request.headers.get(SESSION_HEADER), body.session_hint, self.limits)
        trace_place(2, request_id)
        ignored = ignored_fields(body, fields)
        if ignored and self.strict:
            raise InvalidRequest(f"these fields have no effect here: {', '.join(ignored)}", param=ignored[0])
        header_priority = priority(request.headers, self.limits)
        wait_ms = deadline_ms(request.headers)
        context = RequestContext(
            id=request_id,
            created=int(time.time()),
            model=body.model,
            arrived_s=arrived_s,
            session=session,
            idempotency_key=parse_idempotency_key(request.headers.get(IDEMPOTENCY_KEY), self.limits),
            caller=caller_of(request.scope),
            priority=body.priority if header_priority is None else header_priority,
            wants_timing=wants_timing(request.headers),
            trace=extract_trace(request.headers.items()),
            deadline_s=None if wait_ms is None else time.time() + wait_ms / 1000 - (time.monotonic() - arrived_s),
        )
        return body, context, {IGNORED_FIELDS_HEADER: ", ".join(ignored)} if ignored else {}


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """What a request's headers and connection say, and what every part of its response repeats."""

    id: str
    """Of the response, and of the request in service, engine and logs."""
    created: int
    """Unix time."""
    model: str
    arrived_s: float
    """`time.monotonic` when reading the body began."""
    session: str
    idempotency_key: str
    caller: Caller
    priority: int | None
    deadline_s: float | None
    """Unix time."""
    wants_timing: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)

    def apply_to(self, request: R) -> R:
        """The request with what the headers and the connection say; its body does not."""
        return dataclasses.replace(
            request,
            arrived_s=self.arrived_s,
            session=self.session,
            idempotency_key=self.idempotency_key,
            caller=self.caller,
            trace=self.trace,
            priority=request.priority if self.priority is None else self.priority,
            deadline_s=self.deadline_s,
        )

    def timing_headers(self, timing: RequestTiming | None) -> dict[str, str]:
        """The header with the request's timing, if it is wanted."""
        return {"server-timing": timing.server_timing()} if self.wants_timing and timing is not None else {}

    def response_object(self, kind: str, **fields: Any) -> dict[str, Any]:
        """A JSON object of OpenAI's API. ``kind``: its ``object`` field."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


def usage_object(usage: Usage) -> Mapping[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
