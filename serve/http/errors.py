"""OpenAI's error shape for HTTP: ``{"error": {"message", "type", "param", "code"}}``."""

import math
from typing import Any

import msgspec
from starlette.responses import Response

from serve.errors import ErrorBody, describe


def error_object(body: ErrorBody) -> dict[str, Any]:
    return {"error": {"message": body.message, "type": body.type, "param": body.param, "code": body.code}}


def error_response(error: BaseException, headers: dict[str, str] | None = None) -> Response:
    """The response to a request that failed before its response started."""
    body = describe(error)
    headers = dict(headers or {})
    if body.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(body.retry_after_s))  # RFC 9110: whole seconds
    return json_response(error_object(body), status=body.http_status, headers=headers)


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, headers=headers, media_type="application/json")
