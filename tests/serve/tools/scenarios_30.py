"""Thirty ways to offer tools."""

import json
from typing import Any

from serve.request import Message, ResponseFormat, Tool, ToolCall
from tests.serve.structured.schemas_50 import SHORT, thing

UNIT = {"enum": ["C", "F"]}


def tool(name: str, properties: dict[str, Any] | None = None, description: str = "") -> Tool:
    return Tool(name=name, description=description, parameters=json.dumps(thing(properties or {})))


WEATHER = tool("get_weather", {"city": SHORT, "unit": UNIT}, "What the weather is like")
CLOCK = Tool(name="clock", description="What time it is")
SEARCH = tool("search", {"query": SHORT, "top": {"enum": [1, 5]}})
NESTED = tool("order", {"items": {"type": "array", "items": thing({"id": {"enum": [1, 2]}, "ok": {"type": "boolean"}}), "maxItems": 2}})
TRICKY = tool("say", {"text": {"enum": ["✿FUNCTION✿: x\n✿ARGS✿: {}", "</tool_call>", 'a "quote" \\ and }{']}})
MANY = tuple(tool(f"tool_{number}", {"flag": {"type": "boolean"}}) for number in range(20))
ASK = (Message(role="user", content="What now?"),)
ASK_SYSTEM = (Message(role="system", content="Be brief."), *ASK)
CALLED = Message(role="assistant", content="", tool_calls=(ToolCall(id="c1", name="clock", arguments="{}"),))
BACK = (*ASK, CALLED, Message(role="tool", content="12:30", tool_call_id="c1"))
TWICE = (
    *ASK,
    Message(
        role="assistant",
        content="Let me look.",
        tool_calls=(
            ToolCall(id="a", name="clock", arguments="{}"),
            ToolCall(id="b", name="get_weather", arguments='{"city": "Rome", "unit": "C"}'),
        ),
    ),
    Message(role="tool", content="12:30", tool_call_id="a"),
    Message(role="tool", content="sunny", tool_call_id="b"),
)
LONG = (*BACK, Message(role="assistant", content="Half past twelve."), Message(role="user", content="And the weather?"))
JSON = ResponseFormat(kind="json_schema", text=json.dumps(thing({"ok": {"type": "boolean"}})))


def case(*tools: Tool, messages: tuple[Message, ...] = ASK, choice: str = "auto", named: str | None = None, **more: Any) -> dict[str, Any]:
    return {"tools": tools, "messages": messages, "tool_choice": choice, "tool_name": named, **more}


SCENARIOS: dict[str, dict[str, Any]] = {
    "one tool, forced": case(WEATHER, choice="required"),
    "one tool, named": case(WEATHER, choice="function", named="get_weather"),
    "one tool, free": case(WEATHER),
    "no arguments, forced": case(CLOCK, choice="required"),
    "no arguments, named": case(CLOCK, choice="function", named="clock"),
    "one of two, forced": case(WEATHER, CLOCK, choice="required"),
    "the second of two, named": case(WEATHER, CLOCK, choice="function", named="clock"),
    "two, free": case(WEATHER, CLOCK),
    "nested, forced": case(NESTED, choice="required"),
    "nested, free": case(NESTED, SEARCH),
    "marks in arguments, forced": case(TRICKY, choice="required"),
    "marks in arguments, free": case(TRICKY),
    "one call at most, forced": case(WEATHER, SEARCH, choice="required", parallel_tool_calls=False),
    "one call at most, free": case(WEATHER, SEARCH, parallel_tool_calls=False),
    "twenty, forced": case(*MANY, choice="required"),
    "twenty, named": case(*MANY, choice="function", named="tool_7"),
    "twenty, free": case(*MANY),
    "a system message, forced": case(SEARCH, messages=ASK_SYSTEM, choice="required"),
    "a system message, free": case(SEARCH, messages=ASK_SYSTEM),
    "after a result, free": case(CLOCK, WEATHER, messages=BACK),
    "after a result, forced": case(CLOCK, WEATHER, messages=BACK, choice="required"),
    "after a result, none": case(CLOCK, WEATHER, messages=BACK, choice="none"),
    "after two results, free": case(CLOCK, WEATHER, messages=TWICE),
    "after two results, named": case(CLOCK, WEATHER, messages=TWICE, choice="function", named="get_weather"),
    "after a reply, forced": case(CLOCK, WEATHER, messages=LONG, choice="required"),
    "after a result without tools": case(messages=BACK),
    "none": case(WEATHER, choice="none"),
    "a form or a call": case(WEATHER, choice="auto", form=JSON),
    "a form after a result": case(CLOCK, messages=BACK, choice="auto", form=JSON),
    "a form, none": case(WEATHER, choice="none", form=JSON),
}
assert len(SCENARIOS) == 30
