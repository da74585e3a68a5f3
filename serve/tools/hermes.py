"""The tool protocol of the Hermes models, which Qwen2.5 uses too: <tools>, <tool_call>, <tool_response>.

The English texts below are part of the protocol: the models were trained on exactly these words. Source: the chat template of
Qwen2.5's instruct models.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from serve.request import Message, Tool, ToolCall
from serve.structured.grammar_source import lark_literal
from serve.tools.call_parser import CallSyntax, MarkerCallParser
from serve.tools.protocol import ANY_TEXT, CallRules, Markers, Rendered, ToolCallParser

CALL, CALL_END, RESPONSE, RESPONSE_END = "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"
NEXT, CLOSE = f"\n{CALL}", "}\n" + CALL_END
MARKERS = Markers((CALL, CALL_END, RESPONSE, RESPONSE_END, "<tools>", "</tools>"))
SYNTAX = CallSyntax(
    marker=CALL,
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
    """A `ToolProtocol`. Results of calls come in a user turn."""

    name = "hermes"

    def render(self, messages: Sequence[Message], rules: CallRules) -> Rendered:
        turns: list[dict[str, Any]] = []
        previous_role = ""
        for message in messages:
            if message.role == "tool":
                result = f"{RESPONSE}\n{MARKERS.escape(message.content)}\n{RESPONSE_END}"
                if previous_role == "tool":
                    turns[-1]["content"] += f"\n{result}"
                else:
                    turns.append({"role": "user", "content": result})
            elif message.role == "assistant":
                turns.append({"role": "assistant", "content": _assistant_text(message)})
            else:
                name = {} if message.name is None else {"name": message.name}
                turns.append({"role": message.role, "content": MARKERS.escape(message.content), **name})
            previous_role = message.role
        if rules.shown:
            if turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
            turns[0]["content"] += TOOLS.format(tools="\n".join(map(_signature, rules.shown)))
        return Rendered(messages=turns)

    def grammar(self, rules: CallRules, *, continues: bool) -> str:
        text = f"TEXT: /{ANY_TEXT}/ & ~/{ANY_TEXT}{CALL}{ANY_TEXT}/"
        if not rules.tools:
            return f"start: TEXT\n{text}" if rules.answer is None else f"start: %json {rules.answer}"
        rest = "call" + (f" ({lark_literal(NEXT)} call)*" if rules.parallel else "")
        if rules.required:
            start = f"start: {lark_literal(CALL)} {rest}"
        elif rules.answer is None:
            start = f"start: TEXT | opening {rest}\nopening[lazy]: /{ANY_TEXT}{CALL}/\n{text}"
        else:
            start = f"start: answer | {lark_literal(CALL)} {rest}\nanswer: %json {rules.answer}"
        heads = [lark_literal('\n{"name": "' + tool.name + '", "arguments": ') for tool in rules.tools]
        one = " | ".join(f"{head} arguments_{at}" for at, head in enumerate(heads))
        arguments = "\n".join(f"arguments_{at}: %json {schema}" for at, schema in enumerate(rules.schemas))
        return f"{start}\ncall: ({one}) {lark_literal(CLOSE)}\n{arguments}"

    def parser(self, *, continues: bool, calls_come_first: bool = False) -> ToolCallParser:
        return MarkerCallParser(SYNTAX, calls_come_first=calls_come_first)


def _assistant_text(message: Message) -> str:
    calls = [f"{CALL}\n{_call(call)}\n{CALL_END}" for call in message.tool_calls]
    return "\n".join([MARKERS.escape(message.content)] * bool(message.content or not calls) + calls)


def _call(call: ToolCall) -> str:
    """An earlier call. Arguments that were cut off are not JSON, and are written as a JSON string; so are those nested too deeply."""
    try:
        return _call_with(call.name, json.loads(call.arguments))
    except (ValueError, RecursionError):
        return _call_with(call.name, call.arguments)


def _call_with(name: str, arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": MARKERS.escape_json(arguments)}, ensure_ascii=False)


def _signature(tool: Tool) -> str:
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return json.dumps({"type": "function", "function": MARKERS.escape_json(function)}, ensure_ascii=False)
