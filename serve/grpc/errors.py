"""Errors over gRPC: a canonical code, and google.rpc details in `grpc-status-details-bin`.

A failed call sets code, details and trailing metadata on its context and then *returns*. Behind Ray Serve's proxy a raised error
would lose them, and on a plain server its text would be shown to the client.
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
"""The message is in the trailers three times (twice in base64, once percent-encoded), and clients accept 8 KiB of trailers."""


class CallContext(Protocol):
    """The methods that we use and that both `grpc.aio.ServicerContext` and Ray Serve's `RayServegRPCContext` have."""

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


def refuse(context: CallContext, error: Exception, request_id: str) -> messages_pb2.Error:
    """Sets the call's status to `error`, and returns it as the last event of a stream.

    A stream must send that event: Ray Serve passes the context to its proxy only together with a message.
    """
    body = describe(error)
    code = grpc.StatusCode[body.grpc_code]
    message = _truncate(body.message)
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


def _truncate(message: str) -> str:
    """The message, or its beginning, within `MAX_MESSAGE_BYTES`; no character is cut in half."""
    return message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
