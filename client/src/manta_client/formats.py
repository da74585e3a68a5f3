"""Converts response formats and tools to protobuf. Pydantic models are recognised by their methods, without importing pydantic."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from ._generated import messages_pb2
from .answers import ToolCall

MODES = {"auto": "TOOL_CHOICE_MODE_AUTO", "none": "TOOL_CHOICE_MODE_NONE", "required": "TOOL_CHOICE_MODE_REQUIRED"}

LOOKS = {
    "json_schema": '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
    "regex": '{"type": "regex", "regex": "[a-z]+"}',
    "choice": '{"type": "choice", "choice": ["yes", "no"]}',
    "grammar": '{"type": "grammar", "grammar": "..."}',
}
"""Response formats, for error messages."""


def response_format(form: Any) -> messages_pb2.ResponseFormat | None:
    """A pydantic model, a JSON schema as a dict, or a dict with one of the types below. OpenAI's {"type": "text"} asks for nothing.

    Raises:
        TypeError: it is none of these, or lacks what its type needs.
    """
    if schema := _model_schema(form):
        return messages_pb2.ResponseFormat(json_schema=json.dumps(schema))
    if not isinstance(form, Mapping):
        raise TypeError("response_format must be a pydantic model, a JSON schema, or a dict with a type")
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return messages_pb2.ResponseFormat(json_object=True)
    if not isinstance(kind, str) or kind not in LOOKS:
        return messages_pb2.ResponseFormat(json_schema=json.dumps(form))
    try:
        return _typed_format(kind, form)
    except (KeyError, TypeError):
        raise TypeError(f"response_format of type {kind!r} must look like {LOOKS[kind]}") from None


def _typed_format(kind: str, form: Mapping[str, Any]) -> messages_pb2.ResponseFormat:
    if kind == "json_schema":
        return messages_pb2.ResponseFormat(json_schema=json.dumps(form["json_schema"]["schema"]))
    if kind == "regex":
        return messages_pb2.ResponseFormat(regex=form["regex"])
    if kind == "grammar":
        return messages_pb2.ResponseFormat(grammar=form["grammar"])
    if isinstance(form["choice"], str):
        raise TypeError("each of its letters would be a choice")
    return messages_pb2.ResponseFormat(choices=messages_pb2.Choices(texts=form["choice"]))


def tool_message(tool: Any) -> messages_pb2.Tool:
    """A tool from a pydantic model (with its name and docstring), or from OpenAI's {"type": "function", "function": {...}}.

    Raises:
        TypeError: it is neither.
    """
    if schema := _model_schema(tool):
        return messages_pb2.Tool(name=tool.__name__, description=tool.__doc__ or "", parameters=json.dumps(schema))
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise TypeError('a tool must be a pydantic model or {"type": "function", "function": {"name": ..., "parameters": ...}}')
    parameters = function.get("parameters")
    return messages_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters=None if parameters is None else json.dumps(parameters),
    )


def tool_choice_message(choice: Any) -> messages_pb2.ToolChoice | None:
    """ "auto", "none", "required", or OpenAI's {"type": "function", "function": {"name": ...}}.

    Raises:
        TypeError: it is none of these.
    """
    if choice is None:
        return None
    if isinstance(choice, str) and choice in MODES:
        return messages_pb2.ToolChoice(mode=MODES[choice])
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        return messages_pb2.ToolChoice(function=choice["function"]["name"])
    raise TypeError('tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}')


def call_message(call: Any) -> messages_pb2.ToolCall:
    """A call from a `ToolCall` of an earlier answer, or from OpenAI's dict.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(call, ToolCall):
        return messages_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    try:
        function = call["function"]
        return messages_pb2.ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"])
    except (KeyError, TypeError):
        form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
        raise TypeError(f"a tool call must be a ToolCall or {form}, not {reprlib.repr(call)}") from None


def _model_schema(model: Any) -> dict[str, Any] | None:
    """The JSON schema of a pydantic model class; None for anything else."""
    describe = getattr(model, "model_json_schema", None)
    return dict(describe()) if isinstance(model, type) and callable(describe) else None
