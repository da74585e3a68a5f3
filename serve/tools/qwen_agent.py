"""The tool protocol of Qwen-Agent, which Qwen2's instruct models know: ✿FUNCTION✿, ✿ARGS✿, ✿RESULT✿, ✿RETURN✿.

The markers and the English texts below are part of the protocol: the models were trained on exactly these words.
Source: qwen_agent/llm/fncall_prompts/qwen_fncall_prompt.py of the package `qwen-agent`; `tests/clients` compares with it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from serve.request import Message, Tool
from serve.structured.grammar_source import lark_literal
from serve.tools.call_parser import CallSyntax, MarkerCallParser
from serve.tools.protocol import ANY_TEXT, CallRules, Markers, Rendered, ToolCallParser

FUNCTION, ARGS, RESULT, RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
MARKERS = Markers((FUNCTION, ARGS, RESULT, RETURN))
SYNTAX = {"marker": FUNCTION, "head": re.compile(rf":? ?(?P<name>[^\n]*)\n{ARGS}: ?(?=\S)"), "tail": None, "ends": (RESULT, RETURN)}

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
    """A `ToolProtocol`. Calls, their results and the reply to them are one assistant turn."""

    name = "qwen_agent"

    def render(self, messages: Sequence[Message], rules: CallRules) -> Rendered:
        turns: list[dict[str, Any]] = []
        for message in messages:
            open_turn = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
            if message.role == "tool":
                assert open_turn is not None  # the validator has checked this
                open_turn["content"] = f"{open_turn['content'].removesuffix(REPLY)}\n{RESULT}: {MARKERS.escape(message.content)}{REPLY}"
            elif message.role == "assistant" and open_turn is not None and open_turn["content"].endswith(REPLY):
                open_turn["content"] += self._assistant_text(message, continues=True)
            elif message.role == "assistant":
                turns.append({"role": "assistant", "content": self._assistant_text(message, continues=False)})
            else:
                name = {} if message.name is None else {"name": message.name}
                turns.append({"role": message.role, "content": MARKERS.escape(message.content), **name})
        self._describe_tools(turns, rules)
        return (
            Rendered(messages=turns[:-1], prefix=self._prefix(turns[-1]["content"], rules))
            if _awaits_reply(turns)
            else Rendered(messages=turns)
        )

    def grammar(self, rules: CallRules, *, continues: bool) -> str:
        text = f"TEXT: /{ANY_TEXT}/ & ~/{ANY_TEXT}{FUNCTION}{ANY_TEXT}/"
        lead = '(": ")? ' if continues and not rules.required else ""
        if not rules.tools:
            return f"start: {lead}TEXT\n{text}" if rules.answer is None else f"start: {lead}answer\nanswer: %json {rules.answer}"
        more = f" ({lark_literal(NEXT)} call)*" if rules.parallel else ""
        result = lark_literal("\n" + RESULT)  # a model that is not stopped here writes the results itself
        rest = f"call{more} ({result})?"
        if rules.required:
            start = f"start: {lark_literal(f'{FUNCTION}: ')} {rest}"
        elif rules.answer is None:
            start = f"start: TEXT | opening {rest}\nopening[lazy]: /{ANY_TEXT}{FUNCTION}: /\n{text}"
        else:
            start = f"start: {lead}(answer | {lark_literal(f'{FUNCTION}: ')} {rest})\nanswer: %json {rules.answer}"
        heads = [lark_literal(f"{tool.name}\n{ARGS}: ") for tool in rules.tools]
        one = " | ".join(f"{head} arguments_{at}" for at, head in enumerate(heads))
        arguments = "\n".join(f"arguments_{at}: %json {schema}" for at, schema in enumerate(rules.schemas))
        return f"{start}\ncall: {one}\n{arguments}"

    def parser(self, *, continues: bool, calls_come_first: bool = False) -> ToolCallParser:
        syntax = CallSyntax(**SYNTAX, lead=": " if continues else "")  # type: ignore[arg-type]
        return MarkerCallParser(syntax, calls_come_first=calls_come_first)

    def _assistant_text(self, message: Message, *, continues: bool) -> str:
        text = MARKERS.escape(message.content)
        for call in message.tool_calls:
            text += "\n" if text or continues else ""
            continues = True
            text += f"{FUNCTION}: {call.name}\n{ARGS}: {MARKERS.escape(call.arguments)}"
        return text

    def _describe_tools(self, turns: list[dict[str, Any]], rules: CallRules) -> None:
        """Puts the tools into the system message, after the client's own text."""
        if not rules.shown:
            return
        descriptions = "\n\n".join(map(_description, rules.shown))
        how = (PARALLEL if rules.parallel else ONE).format(names=",".join(tool.name for tool in rules.shown))
        text = TOOLS.format(descriptions=descriptions) + how
        if turns[0]["role"] == "system":
            turns[0] = turns[0] | {"content": f"{turns[0]['content']}\n\n{text}"}
        else:
            turns.insert(0, {"role": "system", "content": text})

    def _prefix(self, content: str, rules: CallRules) -> str:
        """Without the last ": ", which may be one token together with what follows. A call begins on a line of its own."""
        if rules.has_own_grammar:
            return content
        return f"{content}\n" if rules.required else content.removesuffix(": ")


def _awaits_reply(turns: Sequence[dict[str, Any]]) -> bool:
    return bool(turns[-1]["role"] == "assistant" and turns[-1]["content"].endswith(REPLY))


def _description(tool: Tool) -> str:
    parameters = json.dumps(MARKERS.escape_json(json.loads(tool.parameters)), ensure_ascii=False)
    return TOOL.format(name=tool.name, description=MARKERS.escape(tool.description), parameters=parameters).rstrip()
