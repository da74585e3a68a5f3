"""Every error a client can see, and ONE table of what both fronts answer to it.

`describe` turns any exception into what may leave the house: a known error says its own message, an unknown one never does.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import cluster.errors
import engine.errors
from cluster.errors import (
    ChannelError,
    HostLost,
    HostUnreachable,
    NoReplicaReady,
    RecoveryGivenUp,
    ReplicaLost,
    RequestAborted,
    ResumesExhausted,
    SlowReader,
    StartFailed,
    UnfitHosts,
)
from engine.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    EmptyPrompt,
    EngineError,
    EngineStopped,
    GrammarFailed,
    InvalidLogits,
    KvCacheTooSmall,
    PoisonedRequest,
    PromptCannotBeCut,
    PromptTooLong,
    QueueFull,
    WorkersLost,
)
from engine.plan import TokenEvent

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1_000
"""Longer messages are cut: an answer never echoes more of a request than this."""
MAX_PARAM_CHARS = 256
"""Likewise of a field's name, in which a client's own keys may stand."""


class ServeError(Exception):
    """Base of what the service itself reports about a request."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


class InvalidRequest(ServeError):
    """A value that the client sent cannot be used. ``param`` is the field's name in OpenAI's spelling, ``None`` for the whole."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together do not fit into the model's context."""

    def __init__(self, *, prompt_tokens: int, max_tokens: int, limit_tokens: int, param: str) -> None:
        asked = f"{prompt_tokens} in the prompt and {max_tokens} to generate"
        super().__init__(f"this model's context holds {limit_tokens} tokens, and the request asks for {asked}; shorten either", param=param)
        self.prompt_tokens, self.max_tokens, self.limit_tokens = prompt_tokens, max_tokens, limit_tokens


class NotSupported(InvalidRequest):
    """Well formed, and not offered by this server."""


class ModelNotFound(ServeError):
    NAMED = 4
    """As many models are told by name."""

    def __init__(self, name: str, served: Sequence[str] = ()) -> None:
        """``served``: what this server has."""
        what = ", ".join(repr(clipped(each, 64)) for each in served)
        advice = f"this server has {what}" if 0 < len(served) <= self.NAMED else "list the models to see which there are"
        super().__init__(f"there is no model {clipped(name, 64)!r} here; {advice}", param="model")


class RequestTooLarge(ServeError):
    """More bytes than `Limits.body_bytes`."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(f"the request is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class HeadersTooLarge(ServeError):
    """More or longer headers than `Limits.headers` and `Limits.header_bytes`."""

    def __init__(self, *, limit_bytes: int, limit_headers: int) -> None:
        super().__init__(f"the request has more than {limit_headers} headers or {limit_bytes} bytes of them")


class RouteNotFound(ServeError):
    """No such path (HTTP) or method (gRPC)."""


class MethodNotAllowed(ServeError):
    """The path exists, with another HTTP method."""


class UnsupportedMediaType(ServeError):
    """The body is not what its Content-Type must say."""


class TakenOver(ServeError):
    """Its client asked for the rest of the answer in another call."""

    def __init__(self) -> None:
        super().__init__("the same idempotency key came again and asked for the rest of this answer, which goes there")


class Draining(ServeError):
    """Somebody had this server take no new requests; what runs goes on."""

    def __init__(self) -> None:
        super().__init__("this server is being drained and takes no new requests; try again, elsewhere if you can")


class FrontLost(ServeError):
    """The process that read a request died before the answer was whole; told by the proxy before it."""

    def __init__(self) -> None:
        super().__init__("the front that read this request was lost; try again")


class NotReady(ServeError):
    """Asked whether it is ready, and it is not."""


class NotAuthenticated(ServeError):
    """No key, none that is valid, or more than one. Which of these it was is not told."""

    def __init__(self) -> None:
        super().__init__("this server needs an API key: send it as `Authorization: Bearer <key>`, once")


class NotAllowed(ServeError):
    """The key is valid, and not for this."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"this API key does not have the scope {scope!r} that is needed here")


class QuotaExceeded(ServeError):
    """A key has used up what it may ask."""

    def __init__(self, quota: str, *, limit: int, retry_after_s: float) -> None:
        super().__init__(f"this API key may have {limit} {quota}, and has; try again in {max(retry_after_s, 0.1):.1f} s")
        self.quota, self.limit, self.retry_after_s = quota, limit, retry_after_s


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What both fronts answer to one class of errors."""

    http: int
    """HTTP status."""
    grpc: str
    """Name of a `grpc.StatusCode`: this file needs no grpc."""
    code: str
    """OpenAI's ``code``, and the ``reason`` of gRPC's ErrorInfo in capitals."""
    type: str = "server_error"
    """OpenAI's ``type``."""
    retry_after_s: float | None = None
    """When trying again makes sense; an error's own ``retry_after_s`` has precedence."""
    says: str | None = None
    """Replaces the error's own message where that tells of hosts, paths or tracebacks."""


def _bad(code: str, *, http: int = 400, grpc: str = "INVALID_ARGUMENT") -> Wire:
    return Wire(http=http, grpc=grpc, code=code, type="invalid_request_error")


def _unavailable(says: str | None = None, *, code: str = "unavailable") -> Wire:
    return Wire(http=503, grpc="UNAVAILABLE", code=code, retry_after_s=1.0, says=says)


LOST = "the replica that computed the answer was lost; try again"
INTERNAL = Wire(http=500, grpc="INTERNAL", code="internal_error")

WIRE: dict[type[BaseException], Wire] = {
    InvalidRequest: _bad("invalid_value"),
    ContextLengthExceeded: _bad("context_length_exceeded"),
    NotSupported: _bad("not_supported"),
    ModelNotFound: _bad("model_not_found", http=404, grpc="NOT_FOUND"),
    RequestTooLarge: _bad("request_too_large", http=413),
    HeadersTooLarge: _bad("headers_too_large", http=431),
    RouteNotFound: _bad("not_found", http=404, grpc="UNIMPLEMENTED"),
    MethodNotAllowed: _bad("method_not_allowed", http=405, grpc="UNIMPLEMENTED"),
    UnsupportedMediaType: _bad("unsupported_media_type", http=415),
    NotReady: _unavailable(code="not_ready"),
    FrontLost: _unavailable(),
    Draining: _unavailable(code="draining"),
    TakenOver: Wire(http=409, grpc="ABORTED", code="taken_over", type="invalid_request_error"),
    RequestAborted: Wire(http=410, grpc="ABORTED", code="request_aborted", type="invalid_request_error"),
    NotAuthenticated: _bad("invalid_api_key", http=401, grpc="UNAUTHENTICATED"),
    NotAllowed: _bad("insufficient_scope", http=403, grpc="PERMISSION_DENIED"),
    QuotaExceeded: Wire(http=429, grpc="RESOURCE_EXHAUSTED", code="rate_limit_exceeded", type="rate_limit_error", retry_after_s=1.0),
    EmptyPrompt: _bad("empty_prompt"),
    PromptTooLong: _bad("context_length_exceeded"),
    PromptCannotBeCut: _bad("context_length_exceeded"),
    KvCacheTooSmall: _bad("context_length_exceeded"),
    GrammarFailed: _bad("invalid_grammar"),
    DuplicateRequest: _bad("duplicate_request", http=409, grpc="ALREADY_EXISTS"),
    QueueFull: Wire(http=429, grpc="RESOURCE_EXHAUSTED", code="overloaded", type="rate_limit_error", retry_after_s=1.0),
    DeadlineExceeded: Wire(http=504, grpc="DEADLINE_EXCEEDED", code="deadline_exceeded", says="the request's deadline passed"),
    InvalidLogits: Wire(http=500, grpc="INTERNAL", code="invalid_logits"),
    PoisonedRequest: Wire(http=500, grpc="ABORTED", code="poisoned_request"),
    EngineStopped: _unavailable("the engine was stopped before the answer was complete; try again"),
    WorkersLost: _unavailable(LOST),
    HostUnreachable: _unavailable(LOST),
    HostLost: _unavailable(code="host_lost"),  # the one that names a host: whoever runs the server has to look there
    ReplicaLost: _unavailable(LOST),
    ResumesExhausted: _unavailable(),
    NoReplicaReady: _unavailable(),
    StartFailed: _unavailable("the model could not be started"),
    UnfitHosts: _unavailable("the model could not be started"),
    RecoveryGivenUp: _unavailable("the model could not be restarted"),
    SlowReader: _bad("slow_reader", http=408, grpc="ABORTED"),
    ChannelError: INTERNAL,
    EngineError: INTERNAL,
}


@dataclass(frozen=True, kw_only=True)
class ErrorBody:
    """What a client is told. ``message, type, param, code`` are the fields of OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str
    http_status: int
    grpc_code: str
    retry_after_s: float | None
    quota: str | None = None
    """Which quota is used up."""


def describe(error: BaseException) -> ErrorBody:
    """What both fronts answer to ``error``. One that is not in the table is logged under an id, and only the id is told."""
    wire = next((WIRE[kind] for kind in type(error).__mro__ if kind in WIRE), INTERNAL)
    return ErrorBody(
        message=_neutral(error) if wire is INTERNAL else clipped(wire.says or str(error) or wire.code, MAX_MESSAGE_CHARS),
        type=wire.type,
        param=clipped(error.param, MAX_PARAM_CHARS) if isinstance(error, ServeError) and error.param is not None else None,
        code=wire.code,
        http_status=wire.http,
        grpc_code=wire.grpc,
        retry_after_s=wire.retry_after_s and getattr(error, "retry_after_s", wire.retry_after_s),
        quota=error.quota if isinstance(error, QuotaExceeded) else None,
    )


def code_of(error: BaseException) -> str:
    """The code that `describe` tells a client, without logging anything."""
    return next((WIRE[kind].code for kind in type(error).__mro__ if kind in WIRE), INTERNAL.code)


def _neutral(error: BaseException) -> str:
    error_id = secrets.token_hex(8)
    logger.error("internal error %s", error_id, exc_info=error)
    return f"internal error; the server's log has it under {error_id}"


def from_event(event: TokenEvent) -> Exception:
    """The error that ended a choice, as the class it had in the engine (its message is kept, its other attributes are not)."""
    if event.finish_reason != "error":
        return EngineStopped("the engine ended the request unasked")
    kind = getattr(engine.errors, event.error_kind or "", None) or getattr(cluster.errors, event.error_kind or "", None)
    if not (isinstance(kind, type) and issubclass(kind, EngineError)):
        return EngineError(f"{event.error_kind}: {event.error_message}")
    error: EngineError = kind.__new__(kind)
    error.args = (event.error_message or kind.__name__,)
    return error


def clipped(text: str, limit: int) -> str:
    """``text``, or its beginning where it is longer than ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
