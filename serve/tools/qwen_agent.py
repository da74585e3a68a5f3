"""The protocol of Qwen-Agent, which Qwen2's instruct models know: ✿FUNCTION✿, ✿ARGS✿, ✿RESULT✿, ✿RETURN✿.

What stands in capitals below, and the English texts beside it, is the protocol: the models were trained on these very words.
Source: qwen_agent/llm/fncall_prompts/qwen_fncall_prompt.py of the package `qwen-agent`; `tests/clients` compares with it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from serve.request import Message, Tool
from serve.structured.grammar_source import literal
from serve.tools.call_parser import CallReader, Shape
from serve.tools.protocol import ANY_TEXT, Calls, Marks, Reader, Rendered

FUNCTION, ARGS, RESULT, RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
MARKS = Marks((FUNCTION, ARGS, RESULT, RETURN))
SHAPE = {"mark": FUNCTION, "head": re.compile(rf":? ?(?P<name>[^\n]*)\n{ARGS}: ?(?=\S)"), "tail": None, "ends": (RESULT, RETURN)}

NEXT, REPLY = f"\n{FUNCTION}: ", f"\n{RETURN}: "
TOOLS = "# Tools\n\n## You have access to the following tools:\n\n{descriptions}\n\n"
TOOL = "### {name}\n\n{name}: {description} Parameters: {parameters} Format the arguments as a JSON object."
ONE = (
    "## When you need to call a tool, please insert the following command in your reply, which can be called zero or multiple times "
    f"according to your needs:\n\n{FUNCTION}: The tool to use, should be one of [{{names}}]\n{ARGS}: The input of the tool\n"
    f"{RESULT}: Tool results\n{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)"
)
PARALLEL = (
    "## Insert the following command in your reply when you need to call N tools in parallel:\n\n"
    f"{FUNCTION}: The name of tool 1, should be one of [{{names}}]\n{ARGS}: The input of tool 1\n"
    f"{FUNCTION}: The name of tool 2\n{ARGS}: The input of tool 2\n...\n{FUNCTION}: The name of tool N\n{ARGS}: The input of tool N\n"
    f"{RESULT}: The result of tool 1\n{RESULT}: The result of tool 2\n...\n{RESULT}: The result of tool N\n"
    f"{RETURN}: Reply based on tool results. Images need to be rendered as ![](url)"
)


class QwenAgent:
    """A `ToolProtocol`. Calls, results and the reply to them are one turn of the assistant."""

    name = "qwen_agent"

    def render(self, messages: Sequence[Message], calls: Calls) -> Rendered:
        turns: list[dict[str, Any]] = []
        for message in messages:
            mine = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
            if message.role == "tool":
                assert mine is not None  # the validator has seen to that
                mine["content"] = f"{mine['content'].removesuffix(REPLY)}\n{RESULT}: {MARKS.broken(message.content)}{REPLY}"
            elif message.role == "assistant" and mine is not None and mine["content"].endswith(REPLY):
                mine["content"] += self._said(message, goes_on=True)
            elif message.role == "assistant":
                turns.append({"role": "assistant", "content": self._said(message, goes_on=False)})
            else:
                name = {} if message.name is None else {"name": message.name}
                turns.append({"role": message.role, "content": MARKS.broken(message.content), **name})
        self._tell(turns, calls)
        return (
            Rendered(messages=turns[:-1], prefix=self._prefix(turns[-1]["content"], calls)) if _goes_on(turns) else Rendered(messages=turns)
        )

    def grammar(self, calls: Calls, *, continues: bool) -> str:
        text = f"TEXT: /{ANY_TEXT}/ & ~/{ANY_TEXT}{FUNCTION}{ANY_TEXT}/"
        lead = '(": ")? ' if continues and not calls.must else ""
        if not calls.tools:
            return f"start: {lead}TEXT\n{text}" if calls.answer is None else f"start: {lead}answer\nanswer: %json {calls.answer}"
        more = f" ({literal(NEXT)} call)*" if calls.parallel else ""
        result = literal("\n" + RESULT)  # where a model that is not stopped would write the results itself
        rest = f"call{more} ({result})?"
        if calls.must:
            start = f"start: {literal(f'{FUNCTION}: ')} {rest}"
        elif calls.answer is None:
            start = f"start: TEXT | opening {rest}\nopening[lazy]: /{ANY_TEXT}{FUNCTION}: /\n{text}"
        else:
            start = f"start: {lead}(answer | {literal(f'{FUNCTION}: ')} {rest})\nanswer: %json {calls.answer}"
        heads = [literal(f"{tool.name}\n{ARGS}: ") for tool in calls.tools]
        one = " | ".join(f"{head} arguments_{at}" for at, head in enumerate(heads))
        arguments = "\n".join(f"arguments_{at}: %json {schema}" for at, schema in enumerate(calls.schemas))
        return f"{start}\ncall: {one}\n{arguments}"

    def reader(self, *, continues: bool) -> Reader:
        return CallReader(Shape(**SHAPE, lead=": " if continues else ""))  # type: ignore[arg-type]

    def _said(self, message: Message, *, goes_on: bool) -> str:
        text = MARKS.broken(message.content)
        for call in message.tool_calls:
            text += "\n" if text or goes_on else ""
            goes_on = True
            text += f"{FUNCTION}: {call.name}\n{ARGS}: {MARKS.broken(call.arguments)}"
        return text

    def _tell(self, turns: list[dict[str, Any]], calls: Calls) -> None:
        """The tools, behind what the client's own system message says."""
        if not calls.told:
            return
        descriptions = "\n\n".join(map(_description, calls.told))
        how = (PARALLEL if calls.parallel else ONE).format(names=",".join(tool.name for tool in calls.told))
        told = TOOLS.format(descriptions=descriptions) + how
        if turns[0]["role"] == "system":
            turns[0] = turns[0] | {"content": f"{turns[0]['content']}\n\n{told}"}
        else:
            turns.insert(0, {"role": "system", "content": told})

    def _prefix(self, content: str, calls: Calls) -> str:
        """Without the last ": ", as that may be one token with what comes; a call begins on a line of its own."""
        return f"{content}\n" if calls.must else content.removesuffix(": ")


def _goes_on(turns: Sequence[dict[str, Any]]) -> bool:
    return bool(turns[-1]["role"] == "assistant" and turns[-1]["content"].endswith(REPLY))


def _description(tool: Tool) -> str:
    parameters = json.dumps(MARKS.in_json(json.loads(tool.parameters)), ensure_ascii=False)
    return TOOL.format(name=tool.name, description=MARKS.broken(tool.description), parameters=parameters).rstrip()
