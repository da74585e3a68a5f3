"""Events of a stream: OpenAI's own types read them, they nest, and what they tell is the whole answer, however it came in pieces."""

import codecs
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from engine.plan import TokenEvent, TokenLogprobs
from model.generation_config import GenerationDefaults
from serve.caller import ANONYMOUS
from serve.choice import Choice, ChoiceSettings
from serve.errors import describe
from serve.http.context import RequestContext
from serve.http.responses.events import ResponsesStreamFormat
from serve.http.responses.schema import ResponsesBody
from serve.request import ChoiceResult, Result, TextEvent, TextToken, ToolCall, ToolCallDelta, Usage
from serve.text.tokenizer import Tokenizer

STAMP = RequestContext(
    id="resp_ab", created=5, model="m", arrived_s=0.0, session="", idempotency_key="", caller=ANONYMOUS, priority=None, deadline_s=None
)
USAGE = Usage(prompt_tokens=5, completion_tokens=9, cached_tokens=2)
WITH_LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
Decoder = codecs.getincrementaldecoder("utf-8")
READER: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def writer(**fields: Any) -> ResponsesStreamFormat:
    return ResponsesStreamFormat(STAMP, ResponsesBody.model_validate({"model": "m", "input": "Hi", **fields}), GenerationDefaults())


def token(text: str) -> TextToken:
    return TextToken(id=1, text=text, raw=text.encode(), logprobs=TokenLogprobs(logprob=-0.5), top=((2, "x", b"x", -1.0),))


BYTES = (b"a", b" b", "ü".encode(), "🙂".encode(), *(bytes([byte]) for byte in "🙂é".encode()), b"\xff", b"a\xe2", b"", b"ab.c")
CONTROL, END = len(BYTES), len(BYTES) + 1


class EveryBytes:
    """A tokenizer of few tokens: whole characters, halves, broken ones, control tokens."""

    special_ids = frozenset({CONTROL, END})

    def token_bytes(self, token: int) -> bytes:
        return (*BYTES, b"<|control|>", b"<|end|>")[token]


def events_of(tokens: list[int], stop: str) -> list[TextEvent]:
    """What a choice makes of tokens that come one by one, up to a stop string, or the end of sequence behind them."""
    choice = Choice(settings=ChoiceSettings(index=0, prompt_index=0, stop=(stop,)), tokenizer=cast(Tokenizer, EveryBytes()))
    events = []
    for offset, token in enumerate([*tokens, END]):
        ended = {"finish_reason": "stop", "stop_token": END} if token == END else {}
        score = (TokenLogprobs(logprob=-float(offset)),)
        event = choice.apply(TokenEvent(request_id="a", choice=0, attempt=0, offset=offset, tokens=(token,), logprobs=score, **ended))
        events += [event] * (event is not None)
        if choice.finished:
            break
    return events


def told(events: list[TextEvent], **fields: Any) -> list[dict[str, Any]]:
    """All events of a stream, each read by OpenAI's types."""
    writes = writer(**fields)
    sent = [*writes.start(), *(one for event in events for one in writes.event(event)), *writes.end(USAGE)]
    for number, event in enumerate(sent):
        READER.validate_python(event)
        assert event["sequence_number"] == number
    return sent


@st.composite
def answers(draw: st.DrawFn) -> tuple[ChoiceResult, list[TextEvent]]:
    """An answer, and the same in pieces."""
    words = draw(st.lists(st.sampled_from(["a", "ü", " b", "🙂"]), max_size=4))
    calls = [
        ToolCall(id=f"call_{at}", name=draw(st.sampled_from(["one", "two"])), arguments=draw(st.sampled_from(["", "{}", '{"a": "bc"}'])))
        for at in range(draw(st.integers(0, 3)))
    ]
    events = [TextEvent(choice=0, text=word, tokens=(token(word),)) for word in words]
    for at, call in enumerate(calls):
        cut = draw(st.integers(0, len(call.arguments)))
        first, rest = call.arguments[:cut], call.arguments[cut:]
        events.append(TextEvent(choice=0, tool_calls=(ToolCallDelta(index=at, id=call.id, name=call.name, arguments=first),)))
        events += [TextEvent(choice=0, tool_calls=(ToolCallDelta(index=at, arguments=rest),))] * bool(rest)
    reason = draw(st.sampled_from(["length", "tool_calls" if calls else "stop"]))
    events.append(TextEvent(choice=0, tokens=(replace(token("<|im_end|>"), of_text=False),), finish_reason=reason))
    tokens = tuple(one for event in events for one in event.tokens)
    return ChoiceResult(
        choice=0, text="".join(words), tokens=tokens, finish_reason=reason, stop_reason=None, tool_calls=tuple(calls)
    ), events


@settings(max_examples=60)
@given(answers(), st.booleans())
def test_the_pieces_of_a_stream_are_the_whole_answer(made: tuple[ChoiceResult, list[TextEvent]], with_logprobs: bool) -> None:
    choice, events = made
    fields = WITH_LOGPROBS if with_logprobs else {}
    whole = writer(**fields).whole(Result(request_id="resp_ab", choices=(choice,), usage=USAGE))
    Response.model_validate(whole)
    sent = told(events, **fields)
    last = sent[-1]["response"]
    assert last | {"completed_at": 0} == whole | {"completed_at": 0}
    assert sent[-1]["type"] == f"response.{whole['status']}"
    text = "".join(event["delta"] for event in sent if event["type"] == "response.output_text.delta")
    assert text == choice.text
    scores = [one for event in sent if event["type"] == "response.output_text.delta" for one in event["logprobs"]]
    assert "".join(one["token"] for one in scores) == (text if with_logprobs else "")
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in calls] == [
        (call.id, call.name, call.arguments) for call in choice.tool_calls
    ]


@given(st.lists(st.integers(0, CONTROL), max_size=12), st.sampled_from([".c", "b.", "zork"]))
@example([CONTROL, 0, CONTROL, 1], "zork")
@example([BYTES.index(b"\xff"), 0, 1], "zork")
@example([0, BYTES.index(b"\xf0")], "zork")
def test_scores_are_those_of_the_texts_tokens_however_broken_and_the_same_in_a_stream(tokens: list[int], stop: str) -> None:
    events = events_of(tokens, stop)
    text = "".join(event.text for event in events)
    everything = tuple(one for event in events for one in event.tokens)
    choice = ChoiceResult(choice=0, text=text, tokens=everything, finish_reason="stop", stop_reason=None)
    whole = writer(**WITH_LOGPROBS).whole(Result(request_id="resp_ab", choices=(choice,), usage=USAGE))
    assert told(events, **WITH_LOGPROBS)[-1]["response"]["output"] == whole["output"]
    (part,) = whole["output"][0]["content"]
    raw = b"".join(bytes(one["bytes"]) for one in part["logprobs"])
    assert raw.decode("utf-8", "replace").startswith(text)
    at = [int(-one["logprob"]) for one in part["logprobs"]]
    assert [[*tokens, END][one] for one in at] == [token for token in tokens if token < CONTROL][: len(at)]
    before_last = b"".join(bytes(one["bytes"]) for one in part["logprobs"][:-1])
    assert not at or len(Decoder("replace").decode(before_last)) < len(text)


@settings(max_examples=60)
@given(answers())
def test_items_begin_and_end_one_after_the_other_and_pieces_are_within(made: tuple[ChoiceResult, list[TextEvent]]) -> None:
    sent = told(made[1])
    opened: str | None = None
    ended: list[dict[str, Any]] = []
    assert [event["type"] for event in sent[:2]] == ["response.created", "response.in_progress"]
    for event in sent[2:-1]:
        assert event["output_index"] == len(ended)
        if event["type"] == "response.output_item.added":
            assert opened is None
            assert event["item"]["status"] == "in_progress"
            opened = event["item"]["id"]
        elif event["type"] == "response.output_item.done":
            assert event["item"]["id"] == opened
            ended.append(event["item"])
            opened = None
        else:
            assert event["item_id"] == opened
    assert opened is None
    assert ended == sent[-1]["response"]["output"]
    assert len({item["id"] for item in ended}) == len(ended) > 0
    assert {item["status"] for item in ended[:-1]} <= {"completed"}
    assert ended[-1]["status"] == sent[-1]["response"]["status"]


def test_a_call_is_told_as_openai_documents_it() -> None:
    call = ToolCallDelta(index=0, id="call_1", name="one", arguments='{"a"')
    rest = ToolCallDelta(index=0, arguments=": 1}")
    events = told([TextEvent(choice=0, tool_calls=(call,)), TextEvent(choice=0, tool_calls=(rest,), finish_reason="tool_calls")])
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert events[5]["arguments"] == '{"a": 1}'
    assert events[6]["item"] == {
        **{"id": "fc_ab00", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "one"},
        "arguments": '{"a": 1}',
    }


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_is_told_with_what_there_was(begun: bool) -> None:
    writes = writer()
    sent = [*writes.start(), *(writes.event(TextEvent(choice=0, text="Hel")) if begun else ()), *writes.error(describe(RuntimeError("x")))]
    error, failed = sent[-2:]
    for event in (error, failed):
        READER.validate_python(event)
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    assert (error["type"], error["code"], error["error"]["code"]) == ("error", "internal_error", "internal_error")
    assert (failed["type"], failed["response"]["status"], failed["response"]["error"]["code"]) == (
        *("response.failed", "failed", "server_error"),
    )
    assert [item["content"][0]["text"] for item in failed["response"]["output"]] == ["Hel"] * begun


def test_an_answer_repeats_what_it_was_asked_with() -> None:
    tool = {"type": "function", "name": "one", "parameters": {"type": "object", "properties": {}}}
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "name": "Page", "schema": schema, "strict": True}
    asked = {"tools": [tool], "tool_choice": {"type": "function", "name": "one"}, "text": {"format": form}, "metadata": {"a": "b"}}
    (begun, _) = writer(**asked, temperature=0.5, parallel_tool_calls=False, prompt_cache_key="k", safety_identifier="s", user="u").start()
    response = begun["response"]
    Response.model_validate(response)
    assert response["tools"] == [tool | {"description": None, "strict": True}]
    assert response["text"]["format"] == form | {"description": None}
    assert {name: response[name] for name in ("tool_choice", "metadata", "temperature", "parallel_tool_calls", "store")} == {
        **{"tool_choice": asked["tool_choice"], "metadata": {"a": "b"}, "temperature": 0.5, "parallel_tool_calls": False, "store": False}
    }
    assert (response["prompt_cache_key"], response["safety_identifier"], response["user"]) == ("k", "s", "u")
