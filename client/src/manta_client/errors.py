"""The errors of this library.

MantaError
    InvalidEndpoint, InsecureKey     raised before anything is sent
    ModelNotChosen                   the server has several models and none was named
    StreamBroken                     a stream ended before its answer did
    CallFailed                       the server refused or failed, or could not be reached; a subclass per gRPC code
"""

import grpc


class MantaError(Exception):
    """Base of all errors of this library."""


class InvalidEndpoint(MantaError, ValueError):
    """The endpoint cannot be parsed."""


class InsecureKey(MantaError, ValueError):
    """The API key would be sent to another machine without TLS."""


class InvalidKey(MantaError, ValueError):
    """The API key has characters that no API key has."""


class ModelNotChosen(MantaError, ValueError):
    """No model was named and the server does not serve exactly one."""


class StreamBroken(MantaError):
    """The stream ended, or skipped tokens, before the answer was complete."""


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
        """The gRPC code, for instance `grpc.StatusCode.INVALID_ARGUMENT`."""
        self.reason = reason
        """Manta's error code, for instance "context_length_exceeded"."""
        self.param = param
        """The field that is wrong, if the error names one."""
        self.retry_after = retry_after
        """Seconds after which a retry makes sense, if the server named them."""
        self.request_id = request_id
        """The id of the request in the server's log."""

    def __str__(self) -> str:
        words = (self.reason or self.code.name, self.param and f"at {self.param}", self.request_id and f"request {self.request_id}")
        return f"{self.message} ({', '.join(word for word in words if word)})"


class BadRequest(CallFailed):
    """The request is invalid; sending it again will not help."""


class AuthenticationFailed(CallFailed):
    """No API key, or an invalid one."""


class PermissionDenied(CallFailed):
    """The key lacks the scope for this call."""


class NotFound(CallFailed):
    """There is no such model."""


class Overloaded(CallFailed):
    """The server is overloaded, or a quota is used up; see `retry_after`."""


class Unavailable(CallFailed):
    """The server cannot be reached, is not ready, or lost its workers."""


class DeadlineExceeded(CallFailed):
    """`timeout` passed."""


class Cancelled(CallFailed):
    """The call was cancelled."""


class ServerError(CallFailed):
    """The server failed."""


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
