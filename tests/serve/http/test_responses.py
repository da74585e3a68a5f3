"""/v1/responses: the OpenAI SDK's text calls, and what is refused."""

import httpx
import openai
import pytest

from serve.http.app import create_app
from tests.serve.http.conftest import MODEL
from tests.serve.http.loopback import served


@pytest.fixture
async def client(service):
    async with served(create_app(lambda: service)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as made:
        yield made


async def test_a_text_is_answered(client: openai.AsyncOpenAI, service) -> None:
    answer = await client.responses.create(model=MODEL, input="Hi", instructions="Be kind.", max_output_tokens=9, temperature=0.5)
    assert answer.output_text == "Hello world"
    assert answer.status == "completed"
    assert (answer.usage.input_tokens, answer.usage.total_tokens) == (5, 9)
    asked = service.asked[0]
    assert [(message.role, message.content) for message in asked.messages] == [("system", "Be kind."), ("user", "Hi")]
    assert (asked.options.max_tokens, asked.options.temperature) == (9, 0.5)


async def test_a_conversation_is_sent_whole(client: openai.AsyncOpenAI, service) -> None:
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


async def test_an_answer_that_was_cut_is_incomplete(client: openai.AsyncOpenAI, service) -> None:
    service.finish_reason = "length"
    answer = await client.responses.create(model=MODEL, input="Hi")
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    events = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("input", 5, "input"),
        ("input", [{"role": "robot", "content": "x"}], "input"),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}], "input"),
        ("input", [{"type": "function_call_output", "call_id": "1", "output": "x"}], "input"),
        ("previous_response_id", "resp-1", "previous_response_id"),
        ("background", True, "background"),
        ("tools", [{"type": "web_search"}], "tools"),
        ("n", 2, "n"),
        ("max_output_tokens", "9", "max_output_tokens"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(http: httpx.AsyncClient, field: str, value, param: str) -> None:
    answer = await http.post("/v1/responses", json={"model": MODEL, "input": "Hi", field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
