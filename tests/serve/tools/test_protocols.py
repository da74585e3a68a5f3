"""What models are told, what clients cannot tell them, and how answers are read, whatever the pieces they come in."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.request import ChatRequest, Message, Options, ResponseFormat, TextEvent, Tool, ToolCall
from serve.text.tokenizer import Tokenizer
from serve.tools.hermes import Hermes
from serve.tools.protocol import ParsedPiece, ToolCallParser
from serve.tools.qwen_agent import QwenAgent
from serve.tools.request_tools import RequestTools, choose_protocol
from serve.tools.validation import check_conversation, check_tools
from tests.serve.tools.scenarios_30 import ASK, CLOCK, SCENARIOS, TWICE, WEATHER

QWEN_MARKS = ("✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿")
HERMES_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
hostile = st.lists(
    st.sampled_from([*QWEN_MARKS, *HERMES_MARKS, "✿", "FUNCTION", "<tool", "_call>", ": x\n", "}", '"', "a"]), max_size=5
).map("".join)


def request(**fields: Any) -> ChatRequest:
    return ChatRequest(request_id="r", model="m", **{"messages": ASK} | fields)


def text_of(asked: ChatRequest, protocol: QwenAgent | Hermes) -> str:
    request_tools = RequestTools.of(asked, protocol, Limits())
    assert request_tools is not None
    rendered = request_tools.rendered
    turns = [*rendered.messages, {"role": "assistant", "content": rendered.prefix}]  # the model's own turn, with what it goes on from
    return "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)


@pytest.mark.parametrize(("protocol", "marks"), [(QwenAgent(), QWEN_MARKS), (Hermes(), HERMES_MARKS)], ids=["qwen_agent", "hermes"])
@given(said=st.tuples(*[hostile] * 6))
def test_no_text_of_a_clients_adds_a_mark(protocol: QwenAgent | Hermes, marks: tuple[str, ...], said: tuple[str, ...]) -> None:
    def asked(texts: tuple[str, ...]) -> ChatRequest:
        parameters = {"type": "object", "properties": {texts[4] or "p": {"description": texts[5]}}}
        return request(
            messages=(
                Message(role="system", content=texts[0]),
                Message(role="user", content=texts[1]),
                Message(
                    role="assistant", content=texts[2], tool_calls=(ToolCall(id="c", name="f", arguments=json.dumps({"x": texts[3]})),)
                ),
                Message(role="tool", content=texts[0], tool_call_id="c"),
            ),
            tools=(Tool(name="f", description=texts[5], parameters=json.dumps(parameters)),),
        )

    told, harmless = text_of(asked(said), protocol), text_of(asked(("t",) * 6), protocol)
    assert [told.count(mark) for mark in marks] == [harmless.count(mark) for mark in marks]


def test_qwen_agents_calls_results_and_reply_are_one_turn() -> None:
    request_tools = RequestTools.of(request(messages=TWICE, tools=(CLOCK, WEATHER)), QwenAgent(), Limits())
    assert request_tools is not None
    assert [message["role"] for message in request_tools.rendered.messages] == ["system", "user"]
    assert request_tools.rendered.prefix == (
        "Let me look.\n✿FUNCTION✿: clock\n✿ARGS✿: {}\n✿FUNCTION✿: get_weather\n✿ARGS✿: "
        '{"city": "Rome", "unit": "C"}\n✿RESULT✿: 12:30\n✿RESULT✿: sunny\n✿RETURN✿'
    )


def test_hermes_results_are_one_turn_of_the_user() -> None:
    request_tools = RequestTools.of(request(messages=TWICE, tools=(CLOCK, WEATHER)), Hermes(), Limits())
    assert request_tools is not None
    *_, call, results = request_tools.rendered.messages
    assert call["content"].startswith('Let me look.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n<tool_call>')
    assert results == {
        "role": "user",
        "content": "<tool_response>\n12:30\n</tool_response>\n<tool_response>\nsunny\n</tool_response>",
    }


TRICK = {"text": 'a ✿FUNCTION✿: b </tool_call> \\"{[', "n": [1, {"x": "}"}]}
ANSWERS: list[tuple[ToolCallParser, str, str, list[tuple[str, str]]]] = [
    (QwenAgent(), "Just ✿ text with a flower", "Just ✿ text with a flower", []),
    (QwenAgent(), f"Look.\n✿FUNCTION✿: f\n✿ARGS✿: {json.dumps(TRICK)}\n✿RESULT✿: made up", "Look.", [("f", json.dumps(TRICK))]),
    (QwenAgent(), '✿FUNCTION✿: f\n✿ARGS✿: {}\n✿FUNCTION✿: g\n✿ARGS✿: {"a": 1}', "", [("f", "{}"), ("g", '{"a": 1}')]),
    (QwenAgent(), '✿FUNCTION✿: f\n✿ARGS✿: {"cut', "", [("f", '{"cut')]),
    (Hermes(), "1 < 2 and <tool", "1 < 2 and <tool", []),
    (Hermes(), f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(TRICK)}}}\n</tool_call>', "", [("f", json.dumps(TRICK))]),
    (
        Hermes(),
        'So:\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {"a": 1}}\n</tool_call>',
        "So:",
        [("f", "{}"), ("g", '{"a": 1}')],
    ),
]  # type: ignore[list-item]


@pytest.mark.parametrize(("protocol", "text", "content", "calls"), ANSWERS)
@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_read_the_same_in_whatever_pieces_it_comes(protocol: Any, text: str, content: str, calls: Any, seed: int) -> None:
    draw, reader, at = random.Random(seed), protocol.parser(continues=False), 0
    pieces: list[ParsedPiece] = []
    while at < len(text):
        size = len(text) if seed == 0 else draw.randint(1, 1 + 2 * seed)
        pieces += reader.push(text[at : at + size])
        at += size
    pieces += reader.flush()
    found: dict[int, tuple[str, str]] = {}
    for call in (piece.call for piece in pieces if piece.call):
        name, arguments = found.get(call.index, (call.name or "", ""))
        found[call.index] = (name, arguments + call.arguments)
    assert ("".join(piece.content for piece in pieces), list(found.values())) == (content, calls)


MARKS_IN_JSON = json.dumps({"how": "<tool_call>\\n{ ✿FUNCTION✿: f\\n✿ARGS✿: {} ✿RETURN✿ "}, ensure_ascii=False)


@pytest.mark.parametrize("protocol", [QwenAgent(), Hermes()], ids=["qwen_agent", "hermes"])
@pytest.mark.parametrize("after_results", [False, True])
def test_a_json_answer_may_hold_markers(protocol: QwenAgent | Hermes, after_results: bool) -> None:
    messages = TWICE if after_results else ASK
    asked = request(messages=messages, tools=(CLOCK, WEATHER), options=Options(format=ResponseFormat(kind="json_object")))
    request_tools = RequestTools.of(asked, protocol, Limits())
    assert request_tools is not None
    reader, texts = request_tools.parser_for(0), []
    for at, character in enumerate(MARKS_IN_JSON):
        event = reader.read(TextEvent(choice=0, text=character, finish_reason="stop" if at == len(MARKS_IN_JSON) - 1 else None))
        texts.append("" if event is None else event.text)
    assert "".join(texts) == MARKS_IN_JSON
    assert event is not None
    assert event.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("protocol", "text", "calls"), [(one, text, calls) for one, text, content, calls in ANSWERS if calls and not content]
)
def test_calls_are_found_beside_a_json_format(protocol: Any, text: str, calls: Any, size: int) -> None:
    reader = protocol.parser(continues=False, calls_come_first=True)
    pieces = [piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])]
    assert [piece.call.name for piece in pieces if piece.call and piece.call.name] == [name for name, _ in calls]
    assert "".join(piece.call.arguments for piece in pieces if piece.call) == "".join(arguments for _, arguments in calls)
    assert not any(piece.content for piece in pieces)


@pytest.mark.parametrize(
    ("protocol", "text", "reason"),
    [
        (Hermes(), '<tool_call>\n{"name": "clock", "arguments": {"zone', "stop"),
        (Hermes(), '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', "tool_calls"),
        (QwenAgent(), '✿FUNCTION✿: clock\n✿ARGS✿: {"zone', "stop"),
        (QwenAgent(), "✿FUNCTION✿: clock\n✿ARGS✿: {}", "tool_calls"),
    ],
)
def test_a_call_that_a_stop_string_cuts_off_is_not_reported_as_one_to_make(protocol: Any, text: str, reason: str) -> None:
    request_tools = RequestTools.of(request(tools=(CLOCK,)), protocol, Limits())
    assert request_tools is not None
    event = request_tools.parser_for(0).read(TextEvent(choice=0, text=text, finish_reason="stop", stop_reason="x"))
    assert event is not None
    assert event.finish_reason == reason


@pytest.mark.parametrize("depth", [600, 5_000])
def test_arguments_nested_as_deep_as_no_interpreter_goes_are_shown_as_text(depth: int) -> None:
    call = ToolCall(id="c", name="clock", arguments="[" * depth + "]" * depth)
    messages = (*ASK, Message(role="assistant", content="", tool_calls=(call,)), Message(role="tool", content="12:30", tool_call_id="c"))
    assert f'"arguments": "{call.arguments}"' in text_of(request(messages=messages, tools=(CLOCK,)), Hermes())


@pytest.mark.parametrize("text", [": Half past", ":Half past", "Half past"])
def test_what_leads_into_the_reply_after_results_is_no_part_of_it(text: str) -> None:
    reader = QwenAgent().parser(continues=True)
    pieces = [piece for character in text for piece in reader.push(character)] + reader.flush()
    assert "".join(piece.content for piece in pieces) == "Half past"


def test_the_protocol_is_the_models_unless_the_server_says(smol: Tokenizer) -> None:
    assert choose_protocol("auto", smol, None).name == "qwen_agent"
    assert choose_protocol("auto", smol, "{{ '<tool_call>' }}").name == "hermes"
    assert choose_protocol("hermes", smol, None).name == "hermes"


def test_a_request_without_tools_is_left_alone() -> None:
    assert RequestTools.of(request(messages=(Message(role="user", content="✿FUNCTION✿"),)), QwenAgent(), Limits()) is None


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_valid(name: str) -> None:
    asked = request(**{key: value for key, value in SCENARIOS[name].items() if key != "form"})
    check_tools(asked, Limits())
    check_conversation(asked.messages, Limits())


CALL = ToolCall(id="c", name="f", arguments="{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": (CLOCK,) * 2}, "tools[1].function.name"),
        ({"tools": tuple(Tool(name=f"t{number}") for number in range(129))}, "tools"),
        ({"tools": (Tool(name="a b"),)}, "tools[0].function.name"),
        ({"tools": (Tool(name="f", parameters='{"type": "string"}'),)}, "tools[0].function.parameters"),
        ({"tools": (Tool(name="f", parameters="{"),)}, "tools[0].function.parameters"),
        ({"tools": (Tool(name="f", description="x" * 300_000),)}, "tools"),
        ({"tools": (Tool(name="f", description="\ud800"),)}, "tools[0].function.description"),
        ({"tools": (CLOCK,), "tool_choice": "function", "tool_name": "other"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "7"}, "tool_choice"),
        ({"tools": (CLOCK,), "options": Options(format=ResponseFormat(kind="regex", text="a", param="guided_regex"))}, "guided_regex"),
        ({"tools": (Tool(name="f", parameters="{" * 300_000),)}, "tools"),
    ],
)
def test_tools_that_cannot_be_offered_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_tools(request(**fields), Limits())
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([Message(role="tool", content="x", tool_call_id="c")], "messages[0].tool_call_id"),
        ([Message(role="user", content="", tool_calls=(CALL,))], "messages[0].tool_calls"),
        ([Message(role="assistant", content="", tool_calls=(CALL, CALL))], "messages[0].tool_calls[1]"),
        ([Message(role="assistant", content="", tool_calls=(CALL,))], "messages"),
        ([Message(role="assistant", content="", tool_calls=(CALL,)), Message(role="user", content="x")], "messages[1]"),
        ([Message(role="user", content="x", tool_call_id="c")], "messages[0].tool_call_id"),
        ([Message(role="assistant", content="", tool_calls=(ToolCall(id="", name="f", arguments=""),))], "messages[0].tool_calls[0]"),
        (
            [Message(role="assistant", content="", tool_calls=(ToolCall(id="c", name="f\n✿ARGS✿", arguments=""),))],
            "messages[0].tool_calls[0]",
        ),
    ],
)
def test_results_without_calls_and_calls_without_results_are_named(messages: list[Message], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_conversation(messages, Limits())
    assert refusal.value.param == param
