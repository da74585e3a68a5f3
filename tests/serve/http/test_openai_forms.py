"""openai-python, unchanged: parsed answers, and tools called, streamed and answered, by a model with random weights."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from serve.http.app import create_app
from serve.service import Service
from tests.serve.http.loopback import served

ASK = [{"role": "user", "content": "Go"}]
MORE = {"model": "random", "temperature": 1.0, "seed": 2, "max_tokens": 400}


class Page(BaseModel):
    title: str = Field(max_length=6)
    kind: Literal["book", "song"]


PARAMETERS = {"type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("one", "two")]


@pytest.fixture
async def client(random_service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(create_app(lambda: random_service)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(messages=ASK, response_format=Page, **MORE)
    assert isinstance(answer.choices[0].message.parsed, Page)


async def test_a_call_may_be_of_some_of_the_tools_only(client: openai.AsyncOpenAI) -> None:
    def some(*names: str, mode: str = "required") -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    for name in ("one", "two"):
        called = (await client.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice=some(name), **MORE)).choices[0].message
        assert {call.function.name for call in called.tool_calls} == {name}
    await client.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice=some("one", "two", mode="auto"), **MORE)
    broken = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": ["one"]}}
    for wrong in (
        some("three"),
        some("one", mode="none"),
        some(),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": []},
        broken,
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice=wrong, **MORE)
        assert caught.value.param == "tool_choice"
    twice = [*TOOLS, TOOLS[1]]  # those that are not shown are judged as well
    with pytest.raises(openai.BadRequestError, match="another tool has the same name") as caught:
        await client.chat.completions.create(messages=ASK, tools=twice, tool_choice=some("one"), **MORE)
    assert caught.value.param == "tools[2].function.name"


async def test_a_tool_is_called_answered_and_streamed(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **MORE)
    message = first.choices[0].message
    assert (first.choices[0].finish_reason, message.content) == ("tool_calls", None)
    (call,) = message.tool_calls
    assert call.function.name in ("one", "two")
    back = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    named = {"type": "function", "function": {"name": "two"}}
    async with client.chat.completions.stream(messages=back, tools=TOOLS, tool_choice=named, **MORE) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    whole = (await client.chat.completions.create(messages=back, tools=TOOLS, tool_choice=named, **MORE)).choices[0]
    as_qwen_agent_says = [*ASK, message, {"role": "tool", "id": call.id, "content": "done", "name": call.function.name, "extra": {}}]
    again = (await client.chat.completions.create(messages=as_qwen_agent_says, tools=TOOLS, tool_choice=named, **MORE)).choices[0]
    assert [one.function for one in again.message.tool_calls] == [one.function for one in whole.message.tool_calls]
    told = [(one.function.name, one.function.arguments) for one in streamed.message.tool_calls]
    assert told == [(one.function.name, one.function.arguments) for one in whole.message.tool_calls]
    assert all(name == "two" and json.loads(arguments)["c"] in "ab" for name, arguments in told)
