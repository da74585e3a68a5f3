"""Converts gRPC errors to this library's errors."""

from typing import Any

import grpc
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo

from ._generated import messages_pb2
from .errors import CallFailed, failure_class

DETAILS_KEY = "grpc-status-details-bin"
KINDS = (BadRequest, ErrorInfo, RequestInfo, RetryInfo)
CODES = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.RpcError) -> CallFailed:
    """The error of a failed call, from its code and its google.rpc details."""
    code = error.code()
    details = _details(error)
    reason, violation, retry, request = (details.get(kind) for kind in ("ErrorInfo", "BadRequest", "RetryInfo", "RequestInfo"))
    return failure_class(code)(
        error.details() or code.name,
        code=code,
        reason=reason.reason.lower() if reason else None,
        param=violation.field_violations[0].field if violation and violation.field_violations else None,
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        request_id=request.request_id if request else None,
    )


def from_event(error: messages_pb2.Error, request_id: str) -> CallFailed:
    """The error of a stream's error event. The status that follows it says the same."""
    code = CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    return failure_class(code)(
        error.message,
        code=code,
        reason=error.reason.lower() or None,
        param=error.param or None,
        retry_after=error.retry_delay.ToTimedelta().total_seconds() if error.HasField("retry_delay") else None,
        request_id=request_id or None,
    )


def _details(error: grpc.RpcError) -> dict[str, Any]:
    """The google.rpc details by message name, without those that this library does not know."""
    found = {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                for kind in KINDS:
                    if packed.Is(kind.DESCRIPTOR):
                        found[kind.DESCRIPTOR.name] = kind()
                        packed.Unpack(found[kind.DESCRIPTOR.name])
    return found
