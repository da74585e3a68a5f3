"""Items of an input become the messages that /v1/chat/completions would have had of the same conversation."""

from typing import Any

import pytest

from serve.errors import InvalidRequest, NotSupported
from serve.http.responses.error_fields import translate
from serve.http.responses.items import conversation_of, ignored_items
from serve.http.schema import ChatBody

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "a", "name": "one", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "sunny"}
CALLED = {"id": "a", "type": "function", "function": {"name": "one", "arguments": "{}"}}
ANSWERED = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
SAID = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}


def part(kind: str, text: str, key: str = "text") -> dict[str, Any]:
    return {"type": kind, key: text, "annotations": []}


XY = [part("input_text", "x"), part("input_text", "y")]
CONVERSATIONS: list[tuple[str | None, Any, list[dict[str, Any]]]] = [
    (None, "Hi", [USER]),
    ("Be kind.", "Hi", [{"role": "system", "content": "Be kind."}, USER]),
    ("Be kind.", [{"role": "developer", "content": "Now."}, USER], [
        {"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Now."}, USER
    ]),
    (None, [{"type": "message", "role": "user", "content": [part("input_text", "a"), part("text", "b")]}], [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]),
    (None, [USER, SAID | {"content": [part("output_text", "Yes."), part("refusal", "No.", "refusal")]}, USER], [
        USER, {"role": "assistant", "content": "Yes.\nNo."}, USER
    ]),
    (None, [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, USER], [
        USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, USER
    ]),
    (None, [USER, CALL, RESULT], [USER, {"role": "assistant", "tool_calls": [CALLED]}, ANSWERED]),
    (None, [USER, {"type": "reasoning", "id": "rs_1", "summary": []}, SAID | {"content": "Let me see."}, CALL, RESULT], [
        USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALLED]}, ANSWERED
    ]),
    (None, [USER, CALL, SAID | {"content": "Let me see."}, RESULT], [
        USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALLED]}, ANSWERED
    ]),
    (None, [USER, CALL, CALL | {"call_id": "b"}, RESULT | {"call_id": "b", "output": XY}, RESULT], [
        USER, {"role": "assistant", "tool_calls": [CALLED, CALLED | {"id": "b"}]},
        {"role": "tool", "tool_call_id": "b", "content": "x\ny"}, ANSWERED,
    ]),
    (None, [USER, CALL, RESULT, CALL | {"call_id": "b"}, RESULT | {"call_id": "b"}], [
        USER, {"role": "assistant", "tool_calls": [CALLED]}, ANSWERED,
        {"role": "assistant", "tool_calls": [CALLED | {"id": "b"}]}, ANSWERED | {"tool_call_id": "b"},
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("instructions", "given", "as_a_chat"), CONVERSATIONS)
def test_items_are_the_messages_of_the_same_chat(instructions: str | None, given: Any, as_a_chat: list[dict[str, Any]]) -> None:
    chat = ChatBody.model_validate({"model": "m", "messages": as_a_chat}).request("id")
    conversation = conversation_of(instructions, given)
    assert conversation.messages == chat.messages
    assert {f"messages[{at}]" for at in range(len(chat.messages))} <= conversation.places.keys()


def test_messages_and_calls_know_the_items_that_they_came_from() -> None:
    assert conversation_of("Be kind.", [USER, {"type": "reasoning"}, CALL, SAID | {"content": "a"}, CALL, RESULT]).places == {
        "messages[0]": "instructions",
        "messages[1]": "input[0]",
        "messages[2]": "input[2]",
        "messages[2].tool_calls[0]": "input[2]",
        "messages[2].tool_calls[1]": "input[4]",
        "messages[3]": "input[5]",
    }
    assert conversation_of(None, "Hi").places == {"messages[0]": "input"}


def test_items_add_to_a_turn_without_copying_what_it_says_already() -> None:
    """Megabytes that each of two thousand items copied anew would hold up every stream of the front for seconds."""
    long = "a" * 1_000_000
    conversation = conversation_of(None, [USER, CALL, SAID | {"content": long}, *[SAID | {"content": "b"}] * 500])
    said = conversation.turns[-1].texts
    assert said[0] is long
    assert len(said) == 501
    assert conversation.messages[-1].content == "\n".join([long, *["b"] * 500])


@pytest.mark.parametrize(
    ("given", "param", "kind"),
    [
        (5, "input", InvalidRequest),
        (None, "input", InvalidRequest),
        ([USER, 5], "input[1]", InvalidRequest),
        ([{"content": "x"}], "input[0].role", InvalidRequest),
        ([{"role": "robot", "content": "x"}], "input[0].role", InvalidRequest),
        ([{"role": "tool", "content": "x"}], "input[0].role", InvalidRequest),
        ([{"role": "user"}], "input[0].content", InvalidRequest),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0]", InvalidRequest),
        ([{"role": "user", "content": [part("input_text", "x"), {"type": "input_text"}]}], "input[0].content[1].text", InvalidRequest),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}], "input[0].content[0]", NotSupported),
        ([USER, CALL | {"arguments": {"a": 1}}], "input[1].arguments", InvalidRequest),
        ([USER, {"type": "function_call", "name": "one", "arguments": ""}], "input[1].call_id", InvalidRequest),
        ([USER, CALL, {"type": "function_call_output", "call_id": "a"}], "input[2].output", InvalidRequest),
        ([USER, CALL, RESULT | {"output": [{"type": "input_file"}]}], "input[2].output[0]", NotSupported),
        ([{"id": "msg_1"}], "input[0]", NotSupported),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]", NotSupported),
        ([{"type": "compaction", "encrypted_content": "x"}], "input[0]", NotSupported),
        ([{"type": "computer_call"}], "input[0].type", NotSupported),
        ([{"type": ["message"]}], "input[0].type", NotSupported),
    ],
)
def test_what_is_no_item_is_refused_where_it_stands(given: Any, param: str, kind: type[InvalidRequest]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        conversation_of(None, given)
    assert (type(caught.value), caught.value.param) == (kind, param)


def test_items_without_effect_are_named() -> None:
    assert ignored_items([USER, {"type": "reasoning"}, {"type": "web_search_call"}, 5]) == {"reasoning", "web_search_call"}
    assert ignored_items("Hi") == set()


@pytest.mark.parametrize(
    ("of_a_chat", "own"),
    [
        ("messages[1].tool_call_id must name a call, once", "input[4].call_id must name a call, once"),
        ("messages[1]: a call has no message of role tool", "input[4]: a call has no function_call_output"),
        ("messages: the last calls have no messages of role tool", "input: the last calls have no function_call_output"),
        ("messages must have 1 to 2048 entries", "input must have 1 to 2048 entries"),
        ("messages[9].content", "input.content"),
        ("messages[1].tool_calls[1]: every call needs an id", "input[6]: every call needs an id"),
        ("messages[1].tool_calls: at most 128 calls", "input[4]: at most 128 calls"),
        ("tools[2].function.parameters", "tools[3].parameters"),
        ("max_tokens", "max_output_tokens"),
    ],
)
def test_errors_are_spelled_as_this_api_spells_its_fields(of_a_chat: str, own: str) -> None:
    places = {"messages[0]": "instructions", "messages[1]": "input[4]", "messages[1].tool_calls[1]": "input[6]", "tools[2]": "tools[3]"}
    assert translate(of_a_chat, places) == own
