"""What a client asks for is what it gets, from a model that would rather say anything else."""

import json
import re
from contextlib import aclosing
from itertools import count
from typing import Any

import jsonschema
import pytest

from serve.errors import InvalidRequest
from serve.request import ChatRequest, CompletionRequest, Message, Options, ResponseFormat, Result
from serve.service import Service
from tests.serve.structured.schemas_50 import SCHEMAS, SHORT, thing

QUICK = SCHEMAS[::7]


NUMBERS = count()
"""A request's id is its own, as the fronts see to: what a cancelled one still says must find nobody."""


def asked(form: ResponseFormat, **options: Any) -> ChatRequest:
    told = {"temperature": 1.0, "seed": 1, "max_tokens": 400} | options
    messages = (Message(role="user", content="Go"),)
    return ChatRequest(request_id=f"r{next(NUMBERS)}", model="random", messages=messages, options=Options(format=form, **told))


def json_form(schema: Any) -> ResponseFormat:
    return ResponseFormat(kind="json_schema", text=json.dumps(schema))


def check(result: Result, schema: Any) -> int:
    """Every choice is an instance of the schema, unless it says that it was cut. How many are whole."""
    whole = [choice for choice in result.choices if choice.finish_reason == "stop"]
    assert all(choice.finish_reason in ("stop", "length") for choice in result.choices)
    for choice in whole:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(choice.text))
    return len(whole)


@pytest.mark.parametrize("schema", QUICK, ids=lambda schema: json.dumps(schema)[:60])
async def test_every_answer_is_an_instance_of_its_schema(random_service: Service, schema: Any) -> None:
    assert check(await random_service.collect(asked(json_form(schema), n=3)), schema) == 3


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 2.0, "n": 8}, {"top_p": 0.5, "n": 4, "repetition_penalty": 1.3}], ids=repr
)
async def test_fifty_schemas_and_every_answer_an_instance(random_service: Service, schema: Any, options: dict[str, Any]) -> None:
    result = await random_service.collect(asked(json_form(schema), **{"max_tokens": 1500} | options))
    assert check(result, schema) == len(result.choices)


async def test_any_object_is_an_object_or_cut_off_at_its_length(random_service: Service) -> None:
    result = await random_service.collect(asked(ResponseFormat(kind="json_object"), n=8, max_tokens=120))
    for choice in result.choices:
        assert choice.text.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.text), dict)


async def test_an_answer_that_is_cut_says_length(random_service: Service) -> None:
    schema = thing({"long": {"type": "string", "minLength": 200}})
    (choice,) = (await random_service.collect(asked(json_form(schema), max_tokens=20))).choices
    assert (choice.finish_reason, len(choice.tokens)) == ("length", 20)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (ResponseFormat(kind="regex", text=r"[a-f]{2}(\d{2}|ß)"), r"[a-f]{2}([0-9]{2}|ß)"),
        (ResponseFormat(kind="regex", text="a/b\\/c"), "a/b/c"),
        (ResponseFormat(kind="choice", choices=("yes", "no", 'may"be\n')), 'yes|no|may"be\n'),
        (ResponseFormat(kind="grammar", text='start: word ("," word)?\nword: /[ab]{1,3}/'), "[ab]{1,3}(,[ab]{1,3})?"),
        (ResponseFormat(kind="grammar", text='root ::= "x" [0-9] ("y" | "z")'), "x[0-9][yz]"),
    ],
    ids=lambda value: value.kind if isinstance(value, ResponseFormat) else "",
)
async def test_expressions_choices_and_grammars_are_followed(random_service: Service, form: ResponseFormat, expected: str) -> None:
    result = await random_service.collect(asked(form, n=6))
    for choice in result.choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(expected, choice.text)


async def test_a_completion_can_have_a_form_too(random_service: Service) -> None:
    options = Options(format=ResponseFormat(kind="choice", choices=("one", "two")), max_tokens=20, n=2)
    result = await random_service.collect(CompletionRequest(request_id="r", model="random", prompts=("A", "B"), options=options))
    assert {choice.text for choice in result.choices} <= {"one", "two"}
    assert len(result.choices) == 4


async def test_the_streamed_answer_is_the_unstreamed_one(random_service: Service) -> None:
    request = asked(json_form(thing({"name": SHORT, "tags": {"type": "array", "items": SHORT, "maxItems": 3}})), n=3)
    whole = await random_service.collect(request)
    texts = dict.fromkeys(range(3), "")
    async with aclosing(random_service.chat(request)) as events:
        async for event in events:
            texts[event.choice] += event.text
    assert [choice.text for choice in whole.choices] == list(texts.values())


async def test_a_stop_string_ends_the_answer_and_min_tokens_give_way_to_the_form(random_service: Service) -> None:
    form = ResponseFormat(kind="regex", text="[ab]{4}END[ab]{9}")
    (stopped,) = (await random_service.collect(asked(form, stop=("END",)))).choices
    assert re.fullmatch("[ab]{4}", stopped.text)
    assert stopped.stop_reason == "END"
    (short,) = (await random_service.collect(asked(ResponseFormat(kind="choice", choices=("a", "b")), min_tokens=50))).choices
    assert (short.finish_reason, short.text in "ab") == ("stop", True)


async def test_a_form_and_ignore_eos_exclude_each_other(random_service: Service) -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        await random_service.collect(asked(ResponseFormat(kind="json_object"), ignore_eos=True))
