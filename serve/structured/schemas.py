"""Checks of a client's JSON schema or regular expression before it is compiled."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from serve.errors import InvalidRequest
from serve.limits import Limits

ESCAPE_OR_CLASS = re.compile(r"\\(?:.|\Z)|\[(?:\\(?:.|\Z)|[^\]\\])*+(?:\]|\Z)", re.DOTALL)
"""An escape or a character class: one item of a regular expression. Matches to the end where a class is never closed, so that no part is
searched twice."""
NESTED_REPEAT = re.compile(r"\((?:\?:)?[^()|][+*]\??\)[+*]")
"""A repeated group that consists of one repeated item, in an expression whose escapes and classes are single characters. A backtracking
matcher may never finish on such an expression."""
WHITESPACE = {"whitespace_pattern": r"[ \n\r\t]{1,24}"}
"""Enough for any indentation, and a limit for weak models, which tend to write white space endlessly."""


def read_schema(text: str, limits: Limits, *, param: str) -> dict[str, Any]:
    """The object of a JSON schema that may be compiled.

    Raises:
        InvalidRequest: it is not a schema, too large, nested too deeply, or has a `$ref` that refers to itself.
    """
    if len(text.encode()) > limits.schema_bytes:
        raise InvalidRequest(f"{param}: a JSON schema may have at most {limits.schema_bytes} bytes", param=param)
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
    """Raise if a JSON schema is not allowed.

    Raises:
        InvalidRequest: see `read_schema`.
    """
    if _is_deeper(schema, limits.schema_depth):
        raise InvalidRequest(f"{param}: a JSON schema may be nested at most {limits.schema_depth} levels deep", param=param)
    followed: set[str] = set()
    for part in _objects_in(schema):
        if "x-guidance" in part:
            raise InvalidRequest(f"{param}: x-guidance is not allowed", param=param)
        pattern = part.get("pattern")
        if isinstance(pattern, str):
            check_regex(pattern, param=param)
        _check_references(part, schema, param, followed)


def check_regex(pattern: str, *, param: str) -> None:
    """Raise if a regular expression is not allowed.

    Raises:
        InvalidRequest: it has a nested repetition.
    """
    if NESTED_REPEAT.search(ESCAPE_OR_CLASS.sub("a", pattern)):
        raise InvalidRequest(f"{param}: it repeats a group that is only a repetition, as in (a+)+; write it once", param=param)


def with_whitespace(schema: Mapping[str, Any]) -> str:
    """The schema as text for the compiler, with limited white space."""
    return json.dumps({**schema, "x-guidance": WHITESPACE})


def _is_deeper(value: Any, limit: int) -> bool:
    level, depth = [value], 0
    while level:
        if depth >= limit:
            return True
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return False


def _objects_in(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting += [child for child in (value.values() if isinstance(value, dict) else value) if isinstance(child, dict | list)]


def _check_references(part: Mapping[str, Any], schema: Mapping[str, Any], param: str, followed: set[str]) -> None:
    """A chain of references that leads back to itself describes nothing. ``followed``: those of earlier chains, which had an end; a schema
    may be one long chain, and each of its parts is the beginning of another."""
    seen: set[str] = set()
    here: Any = part
    while isinstance(here, dict) and isinstance(reference := here.get("$ref"), str) and reference not in followed:
        if not reference.startswith("#"):
            raise InvalidRequest(f"{param}: $ref must point into the schema itself (#/...)", param=param)
        if reference in seen:
            raise InvalidRequest(f"{param}: a $ref leads back to itself", param=param)
        seen.add(reference)
        here = _resolved(reference, schema)
    followed |= seen


def _resolved(reference: str, schema: Any) -> Any:
    here = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        here = here.get(key) if isinstance(here, dict) else None
    return here
