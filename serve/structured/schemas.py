"""What can be said of a client's schema or expression before anything is compiled."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from serve.errors import InvalidRequest
from serve.limits import Limits

NESTED_REPEAT = re.compile(r"\((?:\?:)?(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]|])[+*]\??\)[+*]")
"""A group that is one repeated item and is repeated itself. Whoever checks such an answer by backtracking may never end."""
WHITESPACE = {"whitespace_pattern": r"[ \n\r\t]{1,24}"}
"""Enough for any indentation, and no room to write blanks for ever, as weak models like to."""


def read_schema(text: str, limits: Limits, *, param: str) -> dict[str, Any]:
    """A JSON schema that may be compiled, as the object that the compiler takes.

    Raises:
        InvalidRequest: it is no schema, too large, too deep, or refers to itself without end.
    """
    if len(text.encode()) > limits.schema_bytes:
        raise InvalidRequest(f"{param}: a JSON schema may have {limits.schema_bytes} bytes", param=param)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest(f"{param}: the JSON schema is not valid JSON", param=param) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param}: a JSON schema must be an object", param=param)
    check_schema(schema, limits, param=param)
    return schema


def check_schema(schema: Mapping[str, Any], limits: Limits, *, param: str) -> None:
    """
    Raises:
        InvalidRequest: see `read_schema`.
    """
    if _is_deeper(schema, limits.schema_depth):
        raise InvalidRequest(f"{param}: a JSON schema may be nested {limits.schema_depth} levels deep", param=param)
    for box in _objects_in(schema):
        if "x-guidance" in box:
            raise InvalidRequest(f"{param}: x-guidance is not taken", param=param)
        pattern = box.get("pattern")
        if isinstance(pattern, str):
            check_regex(pattern, param=param)
        _check_references(box, schema, param)


def check_regex(pattern: str, *, param: str) -> None:
    """
    Raises:
        InvalidRequest: it repeats what is repeated already.
    """
    if NESTED_REPEAT.search(pattern):
        raise InvalidRequest(f"{param}: a repetition of nothing but a repetition, as in (a+)+; say it once", param=param)


def with_whitespace(schema: Mapping[str, Any]) -> str:
    """The schema as text for the compiler."""
    return json.dumps({**schema, "x-guidance": WHITESPACE})


def _is_deeper(value: Any, limit: int) -> bool:
    level, depth = [value], 0
    while level:
        if depth >= limit:
            return True
        level = [child for box in level for child in (box.values() if isinstance(box, dict) else box) if isinstance(child, dict | list)]
        depth += 1
    return False


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        box = waiting.pop()
        if isinstance(box, dict):
            yield box
        waiting += [child for child in (box.values() if isinstance(box, dict) else box) if isinstance(child, dict | list)]


def _check_references(box: Mapping[str, Any], schema: Mapping[str, Any], param: str) -> None:
    """A reference that leads to nothing but references, round and round, says nothing."""
    seen: set[str] = set()
    here: Any = box
    while isinstance(here, dict) and isinstance(reference := here.get("$ref"), str):
        if not reference.startswith("#"):
            raise InvalidRequest(f"{param}: $ref must point into the schema itself (#/...)", param=param)
        if reference in seen:
            raise InvalidRequest(f"{param}: a $ref that leads back to itself", param=param)
        seen.add(reference)
        here = _resolved(reference, schema)


def _resolved(reference: str, schema: Any) -> Any:
    here = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        here = here.get(key) if isinstance(here, dict) else None
    return here
