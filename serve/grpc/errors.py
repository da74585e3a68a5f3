"""Errors as gRPC says them: a canonical code, and google.rpc details in `grpc-status-details-bin`.

A failed call sets code, details and trailing metadata on its context and then *returns*: behind Ray Serve's proxy a
raised error loses them, and on a plain server it would show its text to the client.
"""

from collections.abc import Iterable
from typing import Protocol

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from serve.errors import ErrorBody, describe
from serve.grpc.generated import messages_pb2

DOMAIN = "manta"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 512
"""It travels three times in the trailers (twice in base64, once percent-encoded), and clients take 8 KiB of them."""


class CallContext(Protocol):
    """What `grpc.aio.ServicerContext` and `RayServegRPCContext` have in common and we use."""

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


def refuse(context: CallContext, error: Exception, request_id: str) -> messages_pb2.Error:
    """Let the call end with `error`; given back as a stream's last event.

    A stream must send that event: Ray Serve hands the context to its proxy together with a message, never alone.
    """
    body = describe(error)
    code = grpc.StatusCode[body.grpc_code]
    message = _cut(body.message)
    status = Status(code=code.value[0], message=message)
    for detail in _details(body, message, request_id):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_code(code)
    context.set_details(message)
    context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])
    return _event(body, status)


def _details(body: ErrorBody, message: str, request_id: str) -> list[Message]:
    details: list[Message] = [ErrorInfo(reason=body.code.upper(), domain=DOMAIN)]
    if request_id:
        details.append(RequestInfo(request_id=request_id))
    if body.param is not None:
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(field=body.param, description=message)]))
    if body.quota is not None:
        details.append(QuotaFailure(violations=[QuotaFailure.Violation(subject="api_key", description=body.quota)]))
    if body.retry_after_s is not None:
        details.append(RetryInfo(retry_delay=_duration(body.retry_after_s)))
    return details


def _event(body: ErrorBody, status: Status) -> messages_pb2.Error:
    event = messages_pb2.Error(code=status.code, reason=body.code.upper(), message=status.message, param=body.param or "")
    if body.retry_after_s is not None:
        event.retry_delay.CopyFrom(_duration(body.retry_after_s))
    return event


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _cut(message: str) -> str:
    """The message, or as much of its beginning as fits; never half a character."""
    return message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
