"""Place 1 of a request over HTTP: reads a JSON body, strictly and within limits."""

from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from serve.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType
from serve.http.disconnect import ClientDisconnected
from serve.limits import Limits


async def read_json_object(request: Request, limits: Limits) -> dict[str, Any]:
    """Read the body of a request, which must be a JSON object.

    Raises:
        UnsupportedMediaType: the Content-Type is not JSON in UTF-8, or the body is compressed.
        RequestTooLarge: it has more bytes than the limit, whatever Content-Length says.
        ClientDisconnected: the client left before it had sent all of it.
        InvalidRequest: it is not a JSON object (RFC 8259: no NaN, no Infinity, no lone surrogates), or nested too deeply.
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
    if announced.isdecimal() and int(announced[:20]) > limit:  # 20 digits are enough; Python refuses to parse thousands
        raise RequestTooLarge(limit_bytes=limit)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not accepted")
    read = bytearray()
    try:
        async with aclosing(request.stream()) as pieces:
            async for piece in pieces:
                read += piece
                if len(read) > limit:
                    raise RequestTooLarge(limit_bytes=limit)
    except ClientDisconnect:
        raise ClientDisconnected from None
    return bytes(read)


def parse_json_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidRequest: it is not a JSON object, or nested deeper than ``max_depth`` levels.
    """
    if not raw.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        parsed = msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:  # its messages contain positions, never content
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > max_depth:  # otherwise it cannot be deeper
        _check_depth(parsed, max_depth)
    return parsed


def _check_depth(parsed: Any, max_depth: int) -> None:
    """Level by level: a hostile body must not cause deep recursion."""
    level, depth = [parsed], 1
    while level:
        if depth > max_depth:
            raise InvalidRequest(f"the JSON is nested deeper than {max_depth} levels")
        level = [
            child for parent in level for child in (parent.values() if type(parent) is dict else parent) if type(child) in (dict, list)
        ]
        depth += 1
