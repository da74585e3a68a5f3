"""Functions and forms over /v1/responses, by openai-python, of a model with random weights: what a chat answers, to the letter."""

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
MORE: dict[str, Any] = {"model": "random", "temperature": 1.0, "max_output_tokens": 400, "extra_body": {"seed": 2}}
AS_CHAT: dict[str, Any] = {"model": "random", "temperature": 1.0, "max_tokens": 400, "seed": 2}
PARAMETERS = {"type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False}
TOOLS = [{"type": "function", "name": name, "parameters": PARAMETERS, "strict": True} for name in ("one", "two")]
CHAT_TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("one", "two")]


class Page(BaseModel):
    title: str = Field(max_length=6)
    kind: Literal["book", "song"]


@pytest.fixture
async def client(random_service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(create_app(lambda: random_service)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def calls_of(response: Any) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


async def test_a_function_is_called_answered_and_streamed_as_in_a_chat(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(input=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **MORE)
    chat = await client.chat.completions.create(
        messages=ASK, tools=CHAT_TOOLS, tool_choice="required", parallel_tool_calls=False, **AS_CHAT
    )
    message = chat.choices[0].message
    assert calls_of(first) == [(call.function.name, call.function.arguments) for call in message.tool_calls]
    assert (first.status, first.usage.input_tokens) == ("completed", chat.usage.prompt_tokens)
    (call,) = first.output
    back = [*ASK, *first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    back_in_chat = [*ASK, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
    named = {"type": "function", "name": "two"}
    async with client.responses.stream(input=back, tools=TOOLS, tool_choice=named, **MORE) as stream:
        pieces = [event.delta async for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed = await stream.get_final_response()
    whole = await client.responses.create(input=back, tools=TOOLS, tool_choice=named, **MORE)
    chat = await client.chat.completions.create(
        messages=back_in_chat, tools=CHAT_TOOLS, tool_choice={"type": "function", "function": {"name": "two"}}, **AS_CHAT
    )
    told = [(call.function.name, call.function.arguments) for call in chat.choices[0].message.tool_calls]
    assert calls_of(streamed) == calls_of(whole) == told
    assert "".join(pieces) == "".join(arguments for _, arguments in told)
    assert all(name == "two" and json.loads(arguments)["c"] in "ab" for name, arguments in told)
    assert whole.usage.input_tokens == chat.usage.prompt_tokens


async def test_a_text_beside_functions_is_what_a_chat_says(client: openai.AsyncOpenAI) -> None:
    cut = MORE | {"max_output_tokens": 30}
    answer = await client.responses.create(input=ASK, instructions="Be kind.", tools=TOOLS, tool_choice="none", **cut)
    chat = await client.chat.completions.create(
        messages=[{"role": "system", "content": "Be kind."}, *ASK], tools=CHAT_TOOLS, tool_choice="none", **AS_CHAT | {"max_tokens": 30}
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens


async def test_a_call_may_be_of_some_of_the_functions_only(client: openai.AsyncOpenAI) -> None:
    for name in ("one", "two"):
        some = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": name}]}
        answer = await client.responses.create(input=ASK, tools=TOOLS, tool_choice=some, **MORE)
        assert {called for called, _ in calls_of(answer)} == {name}
        assert answer.tool_choice.mode == "required"


async def test_a_call_that_was_cut_is_incomplete(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(input=ASK, tools=TOOLS, tool_choice="required", **MORE | {"max_output_tokens": 40})
    assert (answer.status, answer.output[-1].type, answer.output[-1].status) == ("incomplete", "function_call", "incomplete")


async def test_a_form_holds_and_is_parsed_into_a_pydantic_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.parse(input=ASK, text_format=Page, **MORE)
    assert isinstance(answer.output_parsed, Page)
    async with client.responses.stream(input=ASK, text_format=Page, **MORE) as stream:
        streamed = await stream.get_final_response()
    assert streamed.output_parsed == answer.output_parsed
    loose = await client.responses.create(input=ASK, text={"format": {"type": "json_object"}}, **MORE)
    assert loose.status == "incomplete" or isinstance(json.loads(loose.output_text), dict)


ERROR_RESPONSE: list[tuple[dict[str, Any], str]] = [
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "three"}}, "tool_choice"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].name"),
    ({"tools": [TOOLS[0] | {"parameters": {"type": "array"}}]}, "tools[0].parameters"),
    ({"tools": [{"type": "web_search"}, TOOLS[0] | {"parameters": {"type": "array"}}]}, "tools[1].parameters"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"input": []}, "input"),
    ({"input": [*ASK, {"type": "function_call", "call_id": "a", "name": "one", "arguments": "{}"}]}, "input"),
    ({"input": [*ASK, {"type": "function_call", "call_id": "a", "name": "one", "arguments": "{}"}, *ASK]}, "input[2]"),
    ({"input": [*ASK, {"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[1].call_id"),
    (
        {
            "input": [
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "a", "name": "one", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "of spaces", "arguments": "{}"},
            ]
        },
        "input[2]",
    ),
    ({"temperature": 3}, "temperature"),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
]


async def test_the_judge_of_chats_refuses_in_this_apis_names(client: openai.AsyncOpenAI) -> None:
    for at, (fields, param) in enumerate(ERROR_RESPONSE):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**{"input": ASK, **MORE, "stream": at % 2 == 0, **fields})
        assert caught.value.param == param
        assert not any(word in caught.value.message for word in ("messages", "role tool", "tool_call_id", ".function"))
