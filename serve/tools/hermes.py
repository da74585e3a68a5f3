"""The protocol of Hermes models, which Qwen2.5 took over: <tools>, <tool_call>, <tool_response>.

The English texts below are the protocol: the models were trained on these very words. Source: the chat template of Qwen2.5's
instruct models.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from serve.request import Message, Tool, ToolCall
from serve.structured.grammar_source import literal
from serve.tools.call_parser import CallReader, Shape
from serve.tools.protocol import ANY_TEXT, Calls, Marks, Reader, Rendered

CALL, CALL_END, RESPONSE, RESPONSE_END = "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"
NEXT, CLOSE = f"\n{CALL}", "}\n" + CALL_END
MARKS = Marks((CALL, CALL_END, RESPONSE, RESPONSE_END, "<tools>", "</tools>"))
SHAPE = Shape(
    mark=CALL,
    head=re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"arguments"\s*:\s*(?=\S)'),
    tail=re.compile(rf"\s*\}}\s*{CALL_END}"),
    ends=(),
)
DEFAULT_SYSTEM = "You are a helpful assistant."
TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within "
    "<tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\nFor each function call, return a json object with function name and "
    f"arguments within {CALL}{CALL_END} XML tags:\n{CALL}\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}'
    f"\n{CALL_END}"
)


class Hermes:
    """A `ToolProtocol`. Results come in a turn of the user."""

    name = "hermes"

    def render(self, messages: Sequence[Message], calls: Calls) -> Rendered:
        turns: list[dict[str, Any]] = []
        before = ""
        for message in messages:
            if message.role == "tool":
                result = f"{RESPONSE}\n{MARKS.broken(message.content)}\n{RESPONSE_END}"
                if before == "tool":
                    turns[-1]["content"] += f"\n{result}"
                else:
                    turns.append({"role": "user", "content": result})
            elif message.role == "assistant":
                turns.append({"role": "assistant", "content": _said(message)})
            else:
                name = {} if message.name is None else {"name": message.name}
                turns.append({"role": message.role, "content": MARKS.broken(message.content), **name})
            before = message.role
        if calls.told:
            if turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
            turns[0]["content"] += TOOLS.format(tools="\n".join(map(_signature, calls.told)))
        return Rendered(messages=turns)

    def grammar(self, calls: Calls, *, continues: bool) -> str:
        text = f"TEXT: /{ANY_TEXT}/ & ~/{ANY_TEXT}{CALL}{ANY_TEXT}/"
        if not calls.tools:
            return f"start: TEXT\n{text}" if calls.answer is None else f"start: %json {calls.answer}"
        rest = "call" + (f" ({literal(NEXT)} call)*" if calls.parallel else "")
        if calls.must:
            start = f"start: {literal(CALL)} {rest}"
        elif calls.answer is None:
            start = f"start: TEXT | opening {rest}\nopening[lazy]: /{ANY_TEXT}{CALL}/\n{text}"
        else:
            start = f"start: answer | {literal(CALL)} {rest}\nanswer: %json {calls.answer}"
        heads = [literal('\n{"name": "' + tool.name + '", "arguments": ') for tool in calls.tools]
        one = " | ".join(f"{head} arguments_{at}" for at, head in enumerate(heads))
        arguments = "\n".join(f"arguments_{at}: %json {schema}" for at, schema in enumerate(calls.schemas))
        return f"{start}\ncall: ({one}) {literal(CLOSE)}\n{arguments}"

    def reader(self, *, continues: bool) -> Reader:
        return CallReader(SHAPE)


def _said(message: Message) -> str:
    calls = [f"{CALL}\n{_call(call)}\n{CALL_END}" for call in message.tool_calls]
    return "\n".join([MARKS.broken(message.content)] * bool(message.content or not calls) + calls)


def _call(call: ToolCall) -> str:
    """An earlier call. Arguments that were cut off are no JSON and are given as a text."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return json.dumps({"name": call.name, "arguments": MARKS.in_json(arguments)}, ensure_ascii=False)


def _signature(tool: Tool) -> str:
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return json.dumps({"type": "function", "function": MARKS.in_json(function)}, ensure_ascii=False)
