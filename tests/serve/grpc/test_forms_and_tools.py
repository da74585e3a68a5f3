"""Forms and tools over gRPC, from the client library down to a real engine with random weights."""

import json
from collections.abc import AsyncIterator

import jsonschema
import pytest
from manta_client import AsyncClient, BadRequest
from pydantic import BaseModel, ConfigDict, Field

from serve.grpc.server import start_server
from serve.service import Service

ASK = [{"role": "user", "content": "Hi"}]
MORE = {"temperature": 1.0, "seed": 5, "max_tokens": 300}


class Person(BaseModel):
    """Somebody."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=150)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False},
    },
}


@pytest.fixture
async def client(random_service: Service) -> AsyncIterator[AsyncClient]:
    server, port = await start_server(random_service, "127.0.0.1:0")
    async with AsyncClient(f"grpc://127.0.0.1:{port}", max_retries=0, timeout=300) as client:
        yield client
    await server.stop(grace=None)


async def test_a_pydantic_model_and_its_schema_are_forms(client: AsyncClient) -> None:
    answer = await client.chat.create(messages=ASK, response_format=Person, **MORE)
    Person.model_validate_json(answer.text)
    again = await client.chat.create(messages=ASK, response_format=Person.model_json_schema(), **MORE)
    assert again.text == answer.text


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"type": "regex", "regex": "[ab]{3}"}, lambda text: set(text) <= {"a", "b"} and len(text) == 3),
        ({"type": "choice", "choice": ["x", "y"]}, lambda text: text in ("x", "y")),
        ({"type": "grammar", "grammar": 'start: "q" "r"?'}, lambda text: text in ("q", "qr")),
    ],
)
async def test_other_forms_are_kept(client: AsyncClient, form, fits) -> None:
    answer = await client.chat.create(messages=ASK, response_format=form, n=2, **MORE)
    assert all(fits(choice.text) for choice in answer.choices)
    completion = await client.completions.create(prompt="A", response_format=form, **MORE)
    assert fits(completion.text)


async def test_a_forced_tool_is_called_and_the_stream_says_the_same(client: AsyncClient) -> None:
    asked = {"messages": ASK, "tools": [WEATHER, Person], "tool_choice": "required", "n": 2, **MORE}
    whole = await client.chat.create(**asked)
    async with client.chat.stream(**asked) as stream:
        final = await stream.final()
    assert [choice.text for choice in final.choices] == [choice.text for choice in whole.choices] == ["", ""]
    for choice, streamed in zip(whole.choices, final.choices, strict=True):
        assert choice.finish_reason == "tool_calls"
        assert [(c.name, c.arguments) for c in choice.tool_calls] == [(c.name, c.arguments) for c in streamed.tool_calls]
        for call in choice.tool_calls:
            schema = Person.model_json_schema() if call.name == "Person" else WEATHER["function"]["parameters"]
            jsonschema.Draft202012Validator(schema).validate(json.loads(call.arguments))


async def test_a_result_goes_back_and_a_named_tool_is_the_only_one(client: AsyncClient) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    first = (await client.chat.create(messages=ASK, tools=[WEATHER], tool_choice=named, parallel_tool_calls=False, **MORE)).choices[0]
    (call,) = first.tool_calls
    back = [*ASK, {"role": "assistant", "tool_calls": first.tool_calls}, {"role": "tool", "content": "sunny", "tool_call_id": call.id}]
    second = await client.chat.create(messages=back, tools=[WEATHER, Person], tool_choice=named, **MORE)
    assert {one.name for one in second.choices[0].tool_calls} == {"weather"}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"response_format": {"$ref": "#"}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ],
)
async def test_what_is_wrong_is_named(client: AsyncClient, wrong, param) -> None:
    with pytest.raises(BadRequest) as refusal:
        await client.chat.create(messages=ASK, **wrong)
    assert refusal.value.param == param
