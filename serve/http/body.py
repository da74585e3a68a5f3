"""Step 1 of a request, over HTTP: bytes of a body become JSON, within limits and without leniency."""

from typing import Any

import msgspec
from starlette.requests import Request

from serve.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType
from serve.limits import Limits


async def read_json_object(request: Request, limits: Limits) -> dict[str, Any]:
    """
    Raises:
        UnsupportedMediaType: the Content-Type does not say JSON in UTF-8.
        RequestTooLarge: more bytes than the limit, whatever Content-Length says or does not say.
        InvalidRequest: not JSON (RFC 8259: no NaN, no Infinity, no lone surrogates), too deep, or no object.
    """
    _check_media_type(request.headers.get("content-type"))
    return parse_json_object(await _read(request, limits.body_bytes), limits.json_depth)


def _check_media_type(content_type: str | None) -> None:
    media_type, *parameters = [part.strip().lower() for part in (content_type or "").split(";")]
    if media_type != "application/json":
        raise UnsupportedMediaType("the Content-Type must be application/json")
    if any(part.startswith("charset=") and part.removeprefix("charset=").strip('"') != "utf-8" for part in parameters):
        raise UnsupportedMediaType("JSON must be sent in UTF-8")


async def _read(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:  # as many digits as anybody needs; Python refuses to read thousands
        raise RequestTooLarge(limit_bytes=limit)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not accepted")
    read = bytearray()
    async for piece in request.stream():
        read += piece
        if len(read) > limit:
            raise RequestTooLarge(limit_bytes=limit)
    return bytes(read)


def parse_json_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """
    Raises:
        InvalidRequest: it is none, or nested deeper than ``max_depth`` levels.
    """
    if not raw.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        parsed = msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:  # its messages name positions, never content
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > max_depth:  # else it cannot be deeper
        _check_depth(parsed, max_depth)
    return parsed


def _check_depth(parsed: Any, max_depth: int) -> None:
    """Level by level, so that a hostile body costs no recursion."""
    level, depth = [parsed], 1
    while level:
        if depth > max_depth:
            raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels")
        level = [child for box in level for child in (box.values() if type(box) is dict else box) if type(child) in (dict, list)]
        depth += 1
