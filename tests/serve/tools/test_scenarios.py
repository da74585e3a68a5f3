"""Thirty ways to offer tools to a model that knows nothing: every call it makes is whole, known, and fits its schema."""

import json
import re
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serve.request import ChatRequest, ChoiceResult, Options, ResponseFormat, ToolCall, ToolCallDelta
from serve.service import Service
from tests.serve.engine_source import engine_service
from tests.serve.tools.scenarios_30 import ASK, CLOCK, SCENARIOS, TWICE

QUICK = {name: case for at, (name, case) in enumerate(SCENARIOS.items()) if at % 4 == 0}


@pytest.fixture(scope="module", params=["qwen_agent", "hermes"])
def service(request: pytest.FixtureRequest, random_folder: Path) -> Iterator[Service]:
    with engine_service(random_folder, tool_protocol=request.param) as (service, _):
        yield service


def request_of(case: dict[str, Any], **options: Any) -> ChatRequest:
    told: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 400, "n": 3, "format": case.get("form")} | options
    rest = {name: value for name, value in case.items() if name != "form"}
    return ChatRequest(request_id="r", model="random", options=Options(**told), **rest)


def eager(service: Service) -> tuple[tuple[int, float], ...]:
    """Biases that make a random model begin a call when it may."""
    mark = "✿FUNCTION✿: " if service._preparer.tool_protocol.name == "qwen_agent" else "<tool_call>"
    return tuple(dict.fromkeys((token, 6.0) for token in service._tokenizer.encode(mark)))


def check(case: dict[str, Any], choice: ChoiceResult) -> None:
    schemas = {tool.name: json.loads(tool.parameters) for tool in case["tools"]}
    cut = choice.finish_reason == "length"
    for call in choice.tool_calls if not cut else choice.tool_calls[:-1]:
        jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
    assert len({call.id for call in choice.tool_calls}) == len(choice.tool_calls)
    if not cut:
        assert choice.finish_reason == ("tool_calls" if choice.tool_calls else "stop")
    if case["tool_choice"] == "required":
        assert choice.tool_calls or cut
        assert choice.text == ""
    if case["tool_choice"] == "function":
        assert {call.name for call in choice.tool_calls} <= {case["tool_name"]}
        assert choice.tool_calls or cut
    if case["tool_choice"] == "none" or not case["tools"]:
        assert not choice.tool_calls
    if not case.get("parallel_tool_calls", True):
        assert len(choice.tool_calls) <= 1
    if case.get("form") and not choice.tool_calls and not cut:
        assert set(json.loads(choice.text)) == {"ok"}


async def played(service: Service, case: dict[str, Any], **options: Any) -> list[ChoiceResult]:
    """The answer, whole and streamed, which are the same."""
    request = request_of(case, **options)
    whole = await service.collect(request)
    texts: dict[int, str] = {}
    calls: dict[int, dict[int, ToolCallDelta]] = {}
    tokens: dict[int, list[int]] = {}
    async with aclosing(service.chat(request)) as events:
        async for event in events:
            texts[event.choice] = texts.get(event.choice, "") + event.text
            tokens.setdefault(event.choice, []).extend(token.id for token in event.tokens)
            for delta in event.tool_calls:
                mine = calls.setdefault(event.choice, {})
                assert (delta.name is not None) == (delta.index not in mine)
                mine[delta.index] = mine[delta.index].with_more(delta.arguments) if delta.index in mine else delta
    for choice in whole.choices:
        streamed = [ToolCall(id=d.id or "", name=d.name or "", arguments=d.arguments) for d in calls.get(choice.choice, {}).values()]
        assert (texts[choice.choice], tuple(streamed)) == (choice.text, choice.tool_calls)
        assert tokens[choice.choice] == [token.id for token in choice.tokens]
        check(case, choice)
    return list(whole.choices)


@pytest.mark.parametrize("name", QUICK)
async def test_calls_are_whole_and_fit_their_schemas(service: Service, name: str) -> None:
    await played(service, SCENARIOS[name], max_tokens=150, n=2, logit_bias=eager(service))


@pytest.mark.parametrize(
    "form",
    [
        ResponseFormat(kind="regex", text=": [ab]{2}<tool_call>✿FUNCTION✿: x"),
        ResponseFormat(kind="choice", choices=("yes ✿RETURN✿", "no ✿RETURN✿")),
        ResponseFormat(kind="grammar", text='start: ("a" | "b") "✿RESULT✿: c"'),
    ],
    ids=lambda form: form.kind,
)
@pytest.mark.parametrize(
    "conversation", [{"messages": TWICE}, {"messages": ASK, "tools": (CLOCK,), "tool_choice": "none"}], ids=["after", "none"]
)
async def test_an_answer_without_calls_may_have_any_format(service: Service, conversation: dict[str, Any], form: ResponseFormat) -> None:
    request = ChatRequest(request_id="r", model="random", options=Options(format=form, seed=1, max_tokens=80), **conversation)
    (choice,) = (await service.collect(request)).choices
    assert choice.finish_reason == "stop"
    assert not choice.tool_calls
    expected = {"regex": r": [ab]{2}<tool_call>✿FUNCTION✿: x", "choice": "(yes|no) ✿RETURN✿", "grammar": "[ab]✿RESULT✿: c"}
    assert re.fullmatch(expected[form.kind], choice.text)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("options", [{"temperature": 0.0, "n": 1}, {}, {"temperature": 2.0, "n": 8}], ids=repr)
async def test_thirty_scenarios_as_the_model_likes(service: Service, name: str, options: dict[str, Any]) -> None:
    await played(service, SCENARIOS[name], **options)


@pytest.mark.slow
async def test_a_free_model_that_likes_calls_makes_many_of_them(service: Service) -> None:
    free = [case for case in SCENARIOS.values() if case["tool_choice"] == "auto" and case["tools"]]
    choices = [choice for case in free for choice in await played(service, case, n=4, logit_bias=eager(service))]
    assert sum(choice.finish_reason == "tool_calls" for choice in choices) >= 5
    assert sum(len(choice.tool_calls) > 1 for choice in choices) >= 1
