"""What every route needs: the service, and how a request of either API is received and answered."""

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
from serve.http.headers import deadline_ms, priority, wants_ledger
from serve.http.schema import NamedBody, ignored_fields, parse
from serve.idempotency import KEY, key_of
from serve.limits import Limits, is_identifier
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, Usage
from serve.request_timing import Ledger
from serve.service_api import Offers
from serve.session import SESSION, session_of
from serve.trace_context import trace_of

IGNORED = "x-manta-ignored-fields"

B = TypeVar("B", bound=NamedBody)
R = TypeVar("R", ChatRequest, CompletionRequest, EmbeddingRequest)


@dataclass(frozen=True, kw_only=True)
class Front:
    """Handed to each file of routes."""

    service: Callable[[], Offers]
    """Asked at each request: the service is made after the routes, in the process that serves."""
    limits: Limits
    strict: bool = False
    """Refuse a field that has no effect here, instead of naming it in a header."""

    async def receive(self, request: Request, kind: type[B], *, id_prefix: str) -> tuple[B, "Stamp", dict[str, str]]:
        """The body, its stamp, and headers for the answer. ``id_prefix``: what the request's id begins with.

        Raises:
            ServeError: see `read_json_object` and `parse`.
        """
        arrived_s, request_id = time.monotonic(), f"{id_prefix}{uuid.uuid4().hex}"
        trace_place(1, request_id)
        fields = await read_json_object(request, self.limits)
        body = parse(kind, fields, self.limits)
        if body.user is not None and not is_identifier(body.user, self.limits):
            raise InvalidRequest(f"user must be 1 to {self.limits.id_chars} of A-Z a-z 0-9 . _ : -", param="user")
        session = session_of(request.headers.get(SESSION), body.belongs_to, self.limits)
        trace_place(2, request_id)
        ignored = ignored_fields(body, fields)
        if ignored and self.strict:
            raise InvalidRequest(f"these fields have no effect here: {', '.join(ignored)}", param=ignored[0])
        said = priority(request.headers)
        wait_ms = deadline_ms(request.headers)
        stamp = Stamp(
            id=request_id,
            created=int(time.time()),
            model=body.model,
            arrived_s=arrived_s,
            session=session,
            idempotency_key=key_of(request.headers.get(KEY), self.limits),
            caller=caller_of(request.scope),
            priority=body.priority if said is None else said,
            wants_ledger=wants_ledger(request.headers),
            trace=trace_of(request.headers.items()),
            deadline_s=None if wait_ms is None else time.time() + wait_ms / 1000 - (time.monotonic() - arrived_s),
        )
        return body, stamp, {IGNORED: ", ".join(ignored)} if ignored else {}


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What is the same in every piece of one answer."""

    id: str
    """Also the request's id in service, engine and logs."""
    created: int
    model: str
    arrived_s: float
    """`time.monotonic` when its body began to be read."""
    session: str
    idempotency_key: str
    caller: Caller
    priority: int | None
    deadline_s: float | None
    """Unix time."""
    wants_ledger: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)

    def timing(self, ledger: Ledger | None) -> dict[str, str]:
        """The header that tells where the time went, if it is wanted."""
        return {"server-timing": ledger.server_timing()} if self.wants_ledger and ledger is not None else {}

    def sign(self, request: R) -> R:
        """The request with what its connection and headers say and its body does not."""
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

    def piece(self, kind: str, **rest: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **rest}


def usage_object(usage: Usage) -> Mapping[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
