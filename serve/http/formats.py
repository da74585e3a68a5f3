"""Place 1 of a request over HTTP: normalises OpenAI's and vLLM's fields for the format of an answer, and OpenAI's for tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict

from serve.errors import InvalidRequest
from serve.request import NO_PARAMETERS, ResponseFormat, Tool, ToolCall

STRUCTURED = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "grammar"}
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FunctionBody(StrictModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Has no effect: arguments always fit their schema here."""


class ToolBody(StrictModel):
    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> Tool:
        function = self.function
        parameters = NO_PARAMETERS if function.parameters is None else to_json(function.parameters)
        return Tool(name=function.name, description=function.description or "", parameters=parameters)


class CalledBody(StrictModel):
    name: str
    arguments: str


class ToolCallBody(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledBody

    def call(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


def response_format(wanted: Any, *, param: str = "response_format", nested: bool = True) -> ResponseFormat | None:
    """OpenAI's ``response_format``. ``nested``: the schema is inside ``json_schema``; else it is beside ``type``.

    Raises:
        InvalidRequest: it is malformed.
    """
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat(kind="json_object", param=param)
    if kind != "json_schema":
        raise InvalidRequest(f'{param}.type must be "text", "json_object" or "json_schema"', param=param)
    inner, at = (wanted.get("json_schema"), f"{param}.json_schema") if nested else (wanted, param)
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict | bool):
        raise InvalidRequest(f"{at} must have a schema", param=param)
    for key, kind, what in (("name", str, "text"), ("description", str, "text"), ("strict", bool, "true or false")):
        if not isinstance(inner.get(key), kind | None):
            raise InvalidRequest(f"{at}.{key} must be {what}", param=param)
    return ResponseFormat(kind="json_schema", text=to_json(inner["schema"]), param=param)


def structured_outputs(wanted: Any) -> ResponseFormat | None:
    """vLLM's ``structured_outputs``: one of json, json_object, regex, choice, grammar.

    Raises:
        InvalidRequest: it is malformed.
    """
    if wanted is None:
        return None
    given = {name: value for name, value in wanted.items() if value not in (None, False)} if isinstance(wanted, dict) else {}
    if len(given) != 1 or not given.keys() <= STRUCTURED.keys():
        raise InvalidRequest(f"structured_outputs must have one of {', '.join(STRUCTURED)}", param="structured_outputs")
    return _structured(*given.popitem(), param="structured_outputs")


def requested_format(fields: Mapping[str, Any], own: ResponseFormat | None = None) -> ResponseFormat | None:
    """The format that one of the fields, or an API's ``own`` field, asks for; None if none does.

    Raises:
        InvalidRequest: two fields ask for a format, or one is malformed.
    """
    guided = [_structured(GUIDED[name], fields[name], param=name) for name in GUIDED if fields.get(name) is not None]
    found = [own, response_format(fields.get("response_format")), structured_outputs(fields.get("structured_outputs")), *guided]
    formats = [one for one in found if one is not None]
    if len(formats) > 1:
        first, second = formats[0].param, formats[1].param
        raise InvalidRequest(f"{second}: {first} already sets the format of the answer; send one of them", param=second)
    return formats[0] if formats else None


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """OpenAI's ``tool_choice``, in the terms of `ChatRequest`."""

    mode: str = "auto"
    name: str | None = None
    """Of the function, if the mode is "function"."""
    allowed: frozenset[str] | None = None

    @classmethod
    def parse(cls, choice: Any) -> "ToolChoice":
        """The choice in a request's `tool_choice`.

        Raises:
            InvalidRequest: it is malformed.
        """
        if choice is None:
            return cls()
        if isinstance(choice, str) and choice in ("auto", "none", "required"):
            return cls(mode=choice)
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            return cls._allowed_tools(choice.get("allowed_tools"))
        return cls(mode="function", name=_function(choice))

    @classmethod
    def _allowed_tools(cls, choice: Any) -> "ToolChoice":
        tools = choice.get("tools") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or choice.get("mode") not in ("auto", "required") or not isinstance(tools, list):
            raise InvalidRequest('tool_choice.allowed_tools must have a mode, "auto" or "required", and tools', param="tool_choice")
        return cls(mode=choice["mode"], allowed=frozenset(map(_function, tools)))


def _function(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest('tool_choice must be "auto", "none", "required" or name a function', param="tool_choice")
    return name


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _structured(name: str, value: Any, *, param: str) -> ResponseFormat:
    if name == "json" and isinstance(value, dict | bool):
        value = to_json(value)
    if name == "json_object":
        return ResponseFormat(kind="json_object", param=param)
    if name == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise InvalidRequest(f"{param} must be a list of strings", param=param)
        return ResponseFormat(kind="choice", choices=tuple(value), param=param)
    if not isinstance(value, str):
        raise InvalidRequest(f"{param} must be text{' or a JSON schema' if name == 'json' else ''}", param=param)
    kinds: dict[str, Literal["json_schema", "regex", "grammar"]] = {"json": "json_schema", "regex": "regex", "grammar": "grammar"}
    return ResponseFormat(kind=kinds[name], text=value, param=param)
