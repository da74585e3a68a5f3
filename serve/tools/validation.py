"""Place 3 of a request: validates tools, and the calls and results in a conversation, for HTTP and gRPC."""

import re
from collections.abc import Sequence

from engine.counted import counted
from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.request import ChatRequest, Message
from serve.structured.schemas import read_schema

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CHOICES = ("auto", "none", "required", "function")


def check_tools(request: ChatRequest, limits: Limits) -> None:
    """Raise if the tools of a request, or its choice of a tool, are invalid.

    Raises:
        InvalidRequest: a tool is invalid, or tool_choice does not fit the tools.
    """
    if len(request.tools) > limits.tools:
        raise InvalidRequest(f"tools has {len(request.tools)} entries, and may have at most {limits.tools}", param="tools")
    num_chars = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in request.tools)
    if num_chars > limits.tools_chars:  # before any schema is read: they may be megabytes
        raise InvalidRequest(f"all tools together may have at most {limits.tools_chars} characters", param="tools")
    names = [tool.name for tool in request.tools]
    for at, tool in enumerate(request.tools):
        param = f"tools[{at}].function"
        if not NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{param}.name must be 1 to 64 of the characters A-Z a-z 0-9 _ -", param=f"{param}.name")
        if tool.name in names[:at]:
            raise InvalidRequest(f"{param}.name: another tool has the same name", param=f"{param}.name")
        _check_text(tool.description, f"{param}.description")
        schema = read_schema(tool.parameters, limits, param=f"{param}.parameters")
        if schema.get("type", "object") != "object":
            raise InvalidRequest(f"{param}.parameters must describe an object", param=f"{param}.parameters")
    _check_choice(request, names)


def _check_choice(request: ChatRequest, names: Sequence[str]) -> None:
    choice = request.tool_choice
    if request.allowed_tools is not None:
        if not request.allowed_tools <= set(names):
            raise InvalidRequest("tool_choice.allowed_tools names a function that is not in tools", param="tool_choice")
        names = [tool.name for tool in request.offered_tools]
    if choice not in CHOICES:
        raise InvalidRequest('tool_choice must be "auto", "none", "required" or name a function', param="tool_choice")
    if choice in ("required", "function") and not names:
        raise InvalidRequest("tool_choice asks for a call, and there are no tools", param="tool_choice")
    if choice == "function" and request.tool_name not in names:
        raise InvalidRequest("tool_choice names a function that is not in tools", param="tool_choice")
    wanted = request.options.format
    if names and choice != "none" and request.options.ignore_eos:
        raise InvalidRequest(
            "ignore_eos cannot be combined with tools, because calls end when they are complete; leave it out", param="ignore_eos"
        )
    if names and choice != "none" and wanted is not None and not wanted.is_json:
        raise InvalidRequest(f"{wanted.param} cannot be combined with tools; a JSON format can", param=wanted.param)


def check_conversation(messages: Sequence[Message], limits: Limits) -> None:
    """Checks that every result answers a call of the assistant message before it, and that all calls are answered before other messages.

    Raises:
        InvalidRequest: names the message.
    """
    open_calls: set[str] = set()
    for at, message in enumerate(messages):
        param = f"messages[{at}]"
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                raise InvalidRequest(
                    f"{param}.tool_call_id must name a call of the assistant before it, once", param=f"{param}.tool_call_id"
                )
            open_calls.remove(message.tool_call_id)
            continue
        if open_calls:
            raise InvalidRequest(f"{param}: a call of the assistant before it has no message of role tool", param=param)
        if message.tool_call_id is not None:
            raise InvalidRequest(f"{param}.tool_call_id belongs to messages of role tool", param=f"{param}.tool_call_id")
        open_calls = _calls_of(message, f"{param}.tool_calls", limits)
    if open_calls:
        raise InvalidRequest("messages: the last calls of the assistant have no messages of role tool", param="messages")


def _calls_of(message: Message, param: str, limits: Limits) -> set[str]:
    if not message.tool_calls:
        return set()
    if message.role != "assistant":
        raise InvalidRequest(f"{param} belongs to messages of role assistant", param=param)
    if len(message.tool_calls) > limits.tool_calls:
        raise InvalidRequest(f"{param}: at most {counted(limits.tool_calls, 'call')} may be given", param=param)
    ids: set[str] = set()
    for at, call in enumerate(message.tool_calls):
        place = f"{param}[{at}]"
        if call.id in ids or not 1 <= len(call.id) <= limits.id_chars:
            raise InvalidRequest(f"{place}: every call needs an id of its own, of 1 to {limits.id_chars} characters", param=place)
        ids.add(call.id)
        if not NAME.fullmatch(call.name):
            raise InvalidRequest(f"{place}: a function's name is 1 to 64 of the characters A-Z a-z 0-9 _ -", param=place)
        _check_text(call.arguments, place)
    return ids


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} holds half a surrogate pair, which is not text", param=param) from None
