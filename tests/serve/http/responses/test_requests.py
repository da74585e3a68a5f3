"""/v1/responses by openai-python, unchanged: texts, what an answer repeats, and what is refused, ignored or failed."""

from typing import Any

import httpx
import openai
import pytest

from engine.errors import PoisonedRequest
from serve.http.app import create_app
from tests.serve.http.conftest import MODEL, ScriptedService
from tests.serve.http.loopback import served


@pytest.fixture
async def client(service):
    async with served(create_app(lambda: service)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as made:
        yield made


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/responses", json={"model": MODEL, "input": "Hi", **fields})


async def test_a_text_is_answered(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    answer = await client.responses.create(model=MODEL, input="Hi", instructions="Be kind.", max_output_tokens=9, temperature=0.5)
    assert answer.output_text == "Hello world"
    assert answer.status == "completed"
    assert (answer.usage.input_tokens, answer.usage.input_tokens_details.cached_tokens, answer.usage.total_tokens) == (5, 2, 9)
    assert (answer.temperature, answer.top_p, answer.store) == (0.5, 0.8, False)
    asked = service.asked[0]
    assert [(message.role, message.content) for message in asked.messages] == [("system", "Be kind."), ("user", "Hi")]
    assert (asked.options.max_tokens, asked.options.temperature) == (9, 0.5)


async def test_a_conversation_is_sent_whole(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    first = await client.responses.create(model=MODEL, input="Hi")
    said = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output), {"role": "user", "content": "And?"}]
    await client.responses.create(model=MODEL, input=said)
    assert [message.role for message in service.asked[1].messages] == ["user", "assistant", "user"]
    assert service.asked[1].messages[1].content == "Hello world"


async def test_the_events_tell_the_same_text_and_end_with_the_whole(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
    events = [event async for event in stream]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello world"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.output_text == "Hello world"


async def test_the_stream_helper_assembles_the_response(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model=MODEL, input="Hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == "Hello world"


async def test_an_answer_that_was_cut_is_incomplete(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    service.finish_reason = "length"
    answer = await client.responses.create(model=MODEL, input="Hi")
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    events = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
    assert events[-1].type == "response.incomplete"


async def test_a_failure_in_a_stream_is_raised_by_openais_library_and_ends_it_as_failed(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, service: ScriptedService
) -> None:
    service.failure, service.fails_at = PoisonedRequest("twice"), 2
    with pytest.raises(openai.APIError, match="twice") as caught:
        [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
    assert caught.value.code == "poisoned_request"
    frames = (await post(http, stream=True)).text.strip().split("\n\n")
    assert [frame.split("\n")[0] for frame in frames[-2:]] == ["event: error", "event: response.failed"]


async def test_logprobs_are_those_of_the_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model=MODEL, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2)
    told = answer.output[0].content[0].logprobs
    assert "".join(token.token for token in told) == "Hello world"
    assert {len(token.top_logprobs) for token in told} == {2}
    plain = await client.responses.create(model=MODEL, input="Hi", include=["reasoning.encrypted_content"])
    assert plain.output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, None),
        ({"store": False, "service_tier": "auto", "truncation": "disabled", "text": {"verbosity": "medium"}, "reasoning": {}}, None),
        ({"background": False, "previous_response_id": None, "tools": [], "tool_choice": "auto", "n": 1, "conversation": None}, None),
        ({"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True}, None),
        ({"store": True, "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}}, "reasoning, store, text.verbosity"),
        ({"truncation": "auto", "service_tier": "flex", "max_tool_calls": 3}, "max_tool_calls, service_tier, truncation"),
        ({"input": [{"role": "user", "content": "Hi"}, {"type": "reasoning", "summary": []}]}, "input.reasoning"),
        ({"tools": [{"type": "web_search"}, {"type": "namespace", "tools": []}]}, "tools.namespace, tools.web_search"),
        ({"of_tomorrow": 1}, "of_tomorrow"),
    ],
)
async def test_what_has_no_effect_is_named_where_it_says_something(
    http: httpx.AsyncClient, fields: dict[str, Any], named: str | None
) -> None:
    answer = await post(http, **fields)
    assert answer.status_code == 200
    assert answer.headers.get("x-manta-ignored-fields") == named


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("input", 5, "input"),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}], "input[0].content[0]"),
        ("input", [{"id": "msg_1", "type": "item_reference"}], "input[0]"),
        ("input", [{"role": "user", "content": ""}] * 2_049, "input"),
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", "conv_1", "conversation"),
        ("prompt", {"id": "pmpt_1"}, "prompt"),
        ("background", True, "background"),
        ("tools", [{"type": "function", "name": "a"}, {"type": ["web_search"]}], "tools[1].type"),
        ("tools", [{"type": "function", "function": {"name": "a"}}], "tools[0]"),
        ("tools", [{"type": "function"}], "tools[0].name"),
        ("tools", [{"type": "web_search"}, {"type": "function"}], "tools[1].name"),
        ("tools", [None], "tools[0]"),
        ("tool_choice", {"type": "file_search"}, "tool_choice"),
        ("tool_choice", {"type": "function"}, "tool_choice"),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto"}, "tool_choice"),
        ("n", 2, "n"),
        ("max_output_tokens", "9", "max_output_tokens"),
        ("max_tokens", 9, "max_tokens"),
        ("include", ["secrets"], "include[0]"),
        ("top_logprobs", 2, "top_logprobs"),
        ("text", {"format": {"type": "xml"}}, "text.format"),
        ("text", {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "text.format"),
        ("text", {"verbosity": "loud"}, "text.verbosity"),
        ("metadata", {str(at): "" for at in range(17)}, "metadata"),
        ("prompt_cache_key", 5, "prompt_cache_key"),
        ("stream_options", {"include_obfuscation": True}, "stream_options.include_obfuscation"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(http: httpx.AsyncClient, field: str, value: Any, param: str) -> None:
    answer = await post(http, **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_who_refers_to_what_would_be_stored_learns_that_nothing_is(http: httpx.AsyncClient) -> None:
    assert "send the whole conversation" in (await post(http, previous_response_id="resp_1")).json()["error"]["message"]
    for answer in (
        await http.get("/v1/responses/resp_1"),
        await http.delete("/v1/responses/resp_1"),
        await http.post("/v1/responses/resp_1/cancel"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "responses are not stored here" in answer.json()["error"]["message"]
    assert "/tokenize" in (await http.post("/v1/responses/input_tokens", json={})).json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "session"),
    [
        ({"prompt_cache_key": "k", "user": "u", "safety_identifier": "s"}, "k"),
        ({"user": "u", "safety_identifier": "s"}, "u"),
        ({"safety_identifier": "s"}, "s"),
    ],
)
async def test_a_cache_key_keeps_requests_together(
    http: httpx.AsyncClient, service: ScriptedService, fields: dict[str, Any], session: str
) -> None:
    await post(http, **fields)
    assert service.asked[0].session == session
    for path, body in (("/v1/responses", {"input": "Hi"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})):
        await http.post(path, json={"model": MODEL, "prompt_cache_key": "any text, however long " * 9, **body})
    *_, first, second = service.asked
    assert first.session == second.session != ""
    assert first.session.isalnum()
