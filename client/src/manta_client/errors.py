"""What can go wrong, made for `except`.

MantaError
    InvalidEndpoint, InsecureKey     before anything was sent
    ModelNotChosen                   several models are served and none was named
    StreamBroken                     a stream ended before its answer did
    CallFailed                       the server, or the way to it, said no: one class per gRPC code
"""

import grpc


class MantaError(Exception):
    """Base of all errors of this library."""


class InvalidEndpoint(MantaError, ValueError):
    """The endpoint cannot be read."""


class InsecureKey(MantaError, ValueError):
    """The API key would be sent in the clear to another machine."""


class ModelNotChosen(MantaError, ValueError):
    """No model was named and the server does not serve exactly one."""


class StreamBroken(MantaError):
    """The stream ended, or skipped tokens, before the answer was whole."""


class CallFailed(MantaError):
    """A call ended with a status that is not OK."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """gRPC's word, for instance `grpc.StatusCode.INVALID_ARGUMENT`."""
        self.reason = reason
        """Manta's word, for instance "context_length_exceeded"."""
        self.param = param
        """The field that is wrong, if one is."""
        self.retry_after = retry_after
        """Seconds after which trying again makes sense, if the server said so."""
        self.request_id = request_id
        """What the server's log calls this request."""

    def __str__(self) -> str:
        words = (self.reason or self.code.name, self.param and f"at {self.param}", self.request_id and f"request {self.request_id}")
        return f"{self.message} ({', '.join(word for word in words if word)})"


class BadRequest(CallFailed):
    """The request cannot be right; sending it again will not help."""


class AuthenticationFailed(CallFailed):
    """No key, or not the right one."""


class PermissionDenied(CallFailed):
    """The key may not do this."""


class NotFound(CallFailed):
    """There is no such model."""


class Overloaded(CallFailed):
    """The server has no room now, or a quota is used up; see `retry_after`."""


class Unavailable(CallFailed):
    """No server, or one that is not ready or lost its workers."""


class DeadlineExceeded(CallFailed):
    """`timeout` passed."""


class Cancelled(CallFailed):
    """The call was cancelled."""


class ServerError(CallFailed):
    """The server failed in a way it does not explain."""


BY_CODE: dict[grpc.StatusCode, type[CallFailed]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.FAILED_PRECONDITION: BadRequest,
    grpc.StatusCode.OUT_OF_RANGE: BadRequest,
    grpc.StatusCode.UNIMPLEMENTED: BadRequest,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationFailed,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}
"""Every other code is a ServerError."""


def failure_class(code: grpc.StatusCode) -> type[CallFailed]:
    return BY_CODE.get(code, ServerError)
