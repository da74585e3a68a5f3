"""The errors that a client can see, and one table that maps each to HTTP and gRPC.

`describe` turns any exception into what a client may see. A known error shows its message; an unknown one never does.
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
from engine.counted import counted
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
"""Longer messages are truncated, so that a response never repeats more of a request than this."""
MAX_PARAM_CHARS = 256
"""The same for the name of a field, which may contain keys that the client chose."""


class ServeError(Exception):
    """Base of the errors that the service itself reports about a request."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


class InvalidRequest(ServeError):
    """The client sent an invalid value. ``param``: OpenAI's name of the field; None: the whole request."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context. The message names what has to change: the prompt, the number of
    tokens to generate, or either."""

    def __init__(self, *, prompt_tokens: int, max_tokens: int, limit_tokens: int, param: str) -> None:
        requested = f"{prompt_tokens} in the prompt and {max_tokens} to generate"
        excess, room = prompt_tokens + max_tokens - limit_tokens, limit_tokens - prompt_tokens
        if prompt_tokens + min(max_tokens, 1) > limit_tokens:
            advice = "shorten the prompt"
        elif max_tokens >= limit_tokens:  # no prompt would be short enough
            advice = f"ask for at most {room} to generate"
        else:
            advice = f"shorten the prompt by {excess}, or ask for at most {room} to generate"
        super().__init__(f"this model's context holds {limit_tokens} tokens, and the request asks for {requested}; {advice}", param=param)
        self.prompt_tokens, self.max_tokens, self.limit_tokens = prompt_tokens, max_tokens, limit_tokens


class NotSupported(InvalidRequest):
    """Valid, but not supported by this server."""


class ModelNotFound(ServeError):
    MAX_NAMED = 4
    """If there are more models, the message does not list them."""

    def __init__(self, name: str, served: Sequence[str] = ()) -> None:
        """``served``: the names of this server's models."""
        what = ", ".join(repr(truncate(each, 64)) for each in served)
        advice = f"this server has {what}" if 0 < len(served) <= self.MAX_NAMED else "list the models to see which there are"
        super().__init__(f"there is no model {truncate(name, 64)!r} here; {advice}", param="model")


class RequestTooLarge(ServeError):
    """The body has more bytes than `Limits.body_bytes`."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(f"the request is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class HeadersTooLarge(ServeError):
    """The headers exceed `Limits.headers` or `Limits.header_bytes`."""

    def __init__(self, *, limit_bytes: int, limit_headers: int) -> None:
        super().__init__(f"the request has more than {limit_headers} headers or {limit_bytes} bytes of them")


class RouteNotFound(ServeError):
    """There is no such path (HTTP) or method (gRPC)."""


class MethodNotAllowed(ServeError):
    """The path exists, but not with this HTTP method."""


class UnsupportedMediaType(ServeError):
    """The Content-Type or Content-Encoding of the body is not supported."""


class TakenOver(ServeError):
    """The client asked for the rest of this answer in another call, which continues it."""

    def __init__(self) -> None:
        super().__init__("another call with the same idempotency key has asked for the rest of this answer and continues it")


class Draining(ServeError):
    """An operator is draining this server: it takes no new requests, and finishes those that are running."""

    def __init__(self) -> None:
        super().__init__("this server is being drained and takes no new requests; try again, elsewhere if you can")


class ServerStopped(ServeError):
    """The server is being stopped, and the request was still running when its grace was over."""

    def __init__(self) -> None:
        super().__init__("this server was stopped before the answer was complete; try again")


class FrontLost(ServeError):
    """The front that handled a request died before its response was complete. Raised in the proxy."""

    def __init__(self) -> None:
        super().__init__("the front that read this request was lost; try again")


class NotReady(ServeError):
    """The answer of a readiness check that fails."""


class NotAuthenticated(ServeError):
    """No key, no valid one, or more than one. The message does not say which."""

    def __init__(self) -> None:
        super().__init__("this server needs an API key: send it as `Authorization: Bearer <key>`, once")


class NotAllowed(ServeError):
    """The key is valid, but lacks the scope."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"this API key does not have the scope '{scope}' that is needed here")


class QuotaExceeded(ServeError):
    """The quota of a key is used up."""

    def __init__(self, quota: str, *, limit: int, retry_after_s: float) -> None:
        """``quota``: its unit, in the plural, such as ``requests per minute``."""
        unit, _, per = quota.partition(" ")
        allowed = counted(limit, unit.removesuffix("s"), unit)
        super().__init__(f"this API key has reached its quota of {allowed} {per}; try again in {max(retry_after_s, 0.1):.1f} s")
        self.quota, self.limit, self.retry_after_s = quota, limit, retry_after_s


@dataclass(frozen=True, kw_only=True)
class ErrorMapping:
    """How HTTP and gRPC report one class of errors."""

    http: int
    """HTTP status."""
    grpc: str
    """Name of a `grpc.StatusCode`, so that this module need not import grpc."""
    code: str
    """OpenAI's ``code``, and the ``reason`` of gRPC's ErrorInfo in capitals."""
    type: str = "server_error"
    """OpenAI's ``type``."""
    retry_after_s: float | None = None
    """When a retry makes sense; an error's own ``retry_after_s`` has precedence."""
    message: str | None = None
    """Replaces the error's own message, if that could reveal hosts, paths or tracebacks."""


def _client_error(code: str, *, http: int = 400, grpc: str = "INVALID_ARGUMENT") -> ErrorMapping:
    return ErrorMapping(http=http, grpc=grpc, code=code, type="invalid_request_error")


def _unavailable(message: str | None = None, *, code: str = "unavailable") -> ErrorMapping:
    return ErrorMapping(http=503, grpc="UNAVAILABLE", code=code, retry_after_s=1.0, message=message)


LOST = "the replica that computed the answer was lost; try again"
INVALID_STATUSES = frozenset({400, 401, 403, 404, 405, 413, 415, 431})
"""HTTP statuses of requests that cannot be answered as they are."""
INTERNAL = ErrorMapping(http=500, grpc="INTERNAL", code="internal_error")

ERROR_MAPPINGS: dict[type[BaseException], ErrorMapping] = {
    InvalidRequest: _client_error("invalid_value"),
    ContextLengthExceeded: _client_error("context_length_exceeded"),
    NotSupported: _client_error("not_supported"),
    ModelNotFound: _client_error("model_not_found", http=404, grpc="NOT_FOUND"),
    RequestTooLarge: _client_error("request_too_large", http=413),
    HeadersTooLarge: _client_error("headers_too_large", http=431),
    RouteNotFound: _client_error("not_found", http=404, grpc="UNIMPLEMENTED"),
    MethodNotAllowed: _client_error("method_not_allowed", http=405, grpc="UNIMPLEMENTED"),
    UnsupportedMediaType: _client_error("unsupported_media_type", http=415),
    NotReady: _unavailable(code="not_ready"),
    FrontLost: _unavailable(),
    Draining: _unavailable(code="draining"),
    ServerStopped: _unavailable(code="draining"),
    TakenOver: ErrorMapping(http=409, grpc="ABORTED", code="taken_over", type="invalid_request_error"),
    RequestAborted: ErrorMapping(http=410, grpc="ABORTED", code="request_aborted", type="invalid_request_error"),
    NotAuthenticated: _client_error("invalid_api_key", http=401, grpc="UNAUTHENTICATED"),
    NotAllowed: _client_error("insufficient_scope", http=403, grpc="PERMISSION_DENIED"),
    QuotaExceeded: ErrorMapping(
        http=429, grpc="RESOURCE_EXHAUSTED", code="rate_limit_exceeded", type="rate_limit_error", retry_after_s=1.0
    ),
    EmptyPrompt: _client_error("empty_prompt"),
    PromptTooLong: _client_error("context_length_exceeded"),
    PromptCannotBeCut: _client_error("context_length_exceeded"),
    KvCacheTooSmall: _client_error("context_length_exceeded"),
    GrammarFailed: _client_error("invalid_grammar"),
    DuplicateRequest: _client_error("duplicate_request", http=409, grpc="ALREADY_EXISTS"),
    QueueFull: ErrorMapping(http=429, grpc="RESOURCE_EXHAUSTED", code="overloaded", type="rate_limit_error", retry_after_s=1.0),
    DeadlineExceeded: ErrorMapping(http=504, grpc="DEADLINE_EXCEEDED", code="deadline_exceeded", message="the request's deadline passed"),
    InvalidLogits: ErrorMapping(http=500, grpc="INTERNAL", code="invalid_logits"),
    PoisonedRequest: ErrorMapping(http=500, grpc="ABORTED", code="poisoned_request"),
    EngineStopped: _unavailable("the engine was stopped before the answer was complete; try again"),
    WorkersLost: _unavailable(LOST),
    HostUnreachable: _unavailable(LOST),
    HostLost: _unavailable(code="host_lost"),  # the only one that names a host: an operator has to look there
    ReplicaLost: _unavailable(LOST),
    ResumesExhausted: _unavailable(),
    NoReplicaReady: _unavailable(),
    StartFailed: _unavailable("the model could not be started"),
    UnfitHosts: _unavailable("the model could not be started"),
    RecoveryGivenUp: _unavailable("the model could not be restarted"),
    SlowReader: _client_error("slow_reader", http=408, grpc="ABORTED"),
    ChannelError: INTERNAL,
    EngineError: INTERNAL,
}


@dataclass(frozen=True, kw_only=True)
class ErrorBody:
    """What a client sees of an error. ``message, type, param, code`` are the fields of OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str
    http_status: int
    grpc_code: str
    retry_after_s: float | None
    quota: str | None = None
    """The quota that is used up."""


def describe(error: BaseException) -> ErrorBody:
    """How HTTP and gRPC report ``error``. An error that is not in the table is logged under an id, and the client sees only the id."""
    mapping = next((ERROR_MAPPINGS[kind] for kind in type(error).__mro__ if kind in ERROR_MAPPINGS), INTERNAL)
    return ErrorBody(
        message=_log_internal(error) if mapping is INTERNAL else truncate(mapping.message or str(error) or mapping.code, MAX_MESSAGE_CHARS),
        type=mapping.type,
        param=truncate(error.param, MAX_PARAM_CHARS) if isinstance(error, ServeError) and error.param is not None else None,
        code=mapping.code,
        http_status=mapping.http,
        grpc_code=mapping.grpc,
        retry_after_s=mapping.retry_after_s and getattr(error, "retry_after_s", mapping.retry_after_s),
        quota=error.quota if isinstance(error, QuotaExceeded) else None,
    )


def code_of(error: BaseException) -> str:
    """The code in `describe`, without logging anything."""
    return next((ERROR_MAPPINGS[kind].code for kind in type(error).__mro__ if kind in ERROR_MAPPINGS), INTERNAL.code)


def invalid_code(error: BaseException) -> str | None:
    """The code in `describe` if the request itself is to blame, so that sending it again would not help; None otherwise.

    A request that was ended (`TakenOver`, `RequestAborted`, `SlowReader`) or exists already was valid, though its errors have the type
    ``invalid_request_error``, as OpenAI's do.
    """
    mapping = next((ERROR_MAPPINGS[kind] for kind in type(error).__mro__ if kind in ERROR_MAPPINGS), INTERNAL)
    return mapping.code if mapping.http in INVALID_STATUSES else None


def _log_internal(error: BaseException) -> str:
    """Logs the error under an id. Returns the message for the client."""
    error_id = secrets.token_hex(8)
    logger.error("internal error %s", error_id, exc_info=error)
    return f"internal error; the server's log has it under {error_id}"


def error_from_event(event: TokenEvent) -> Exception:
    """The error that ended a choice, in the class that it had in the engine. Keeps its message, not its other attributes."""
    if event.finish_reason != "error":
        return EngineStopped("the engine cancelled the request without being asked to")
    kind = getattr(engine.errors, event.error_kind or "", None) or getattr(cluster.errors, event.error_kind or "", None)
    if not (isinstance(kind, type) and issubclass(kind, EngineError)):
        return EngineError(f"{event.error_kind}: {event.error_message}")
    error: EngineError = kind.__new__(kind)
    error.args = (event.error_message or kind.__name__,)
    return error


def truncate(text: str, limit: int) -> str:
    """``text``, cut to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
