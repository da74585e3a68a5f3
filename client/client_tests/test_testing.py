"""The fake server that users of the library test with."""

import json
import math
import urllib.error
import urllib.request

import openai
import pytest
from manta_client import (
    AsyncClient,
    AuthenticationFailed,
    BadRequest,
    Client,
    NotFound,
    Overloaded,
    ServerError,
    Unavailable,
)
from manta_client.testing import Answer, Call, Failure, FakeServer
from manta_client.testing.fixtures import manta_server

__all__ = ["manta_server"]
MESSAGES = [{"role": "user", "content": "Why is it so?"}]


def test_a_fixture_is_where_a_client_goes_by_itself(manta_server: FakeServer) -> None:
    manta_server.say("First.", "Second.")
    with Client() as client:
        told = [client.chat.create(messages=MESSAGES).text for _ in range(3)]
    assert told == ["First.", "Second.", "This is a test."]
    first = manta_server.requests[0]
    assert (first.kind, first.protocol, first.streamed, first.model) == ("chat", "grpc", False, "fake")
    assert first.messages == [{"role": "user", "content": "Why is it so?"}]


def test_a_request_can_be_answered_by_what_it_says(manta_server: FakeServer) -> None:
    manta_server.say(lambda request: Answer(request.messages[0]["content"].upper()))
    with Client() as client:
        assert client.chat.create(messages=MESSAGES, temperature=0.5, stop="x").text == "WHY IS IT SO?"
    options = manta_server.requests[0].options
    assert (options["temperature"], options["stop"]) == (0.5, ["x"])


async def test_streams_are_the_same_in_pieces(manta_server: FakeServer) -> None:
    manta_server.say(Answer("Grüße dich", pieces=("Grü", "ße", " dich")), "Two words")
    async with AsyncClient() as client:
        stream = client.chat.stream(messages=MESSAGES)
        assert [delta.text async for delta in stream] == ["Grü", "ße", " dich", ""]
        final = await stream.final()
        assert (final.text, final.usage.prompt_tokens, final.usage.completion_tokens) == ("Grüße dich", 4, 3)
        completion = await client.completions.stream(prompt=["Once", [1, 2]], n=2).final()
        assert [choice.text for choice in completion.choices] == ["Two words"] * 4


def test_a_length_cuts_as_a_model_would(manta_server: FakeServer) -> None:
    with Client() as client:
        whole = client.chat.create(messages=MESSAGES, max_tokens=2)
        streamed = client.chat.stream(messages=MESSAGES, max_tokens=2).final()
    for answer in (whole, streamed):
        assert (answer.text, answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("This is", "length", 2)


def test_tools_are_asked_for_whole_and_streamed(manta_server: FakeServer) -> None:
    call = Call(name="weather", arguments='{"city": "Paris"}')
    manta_server.say(Answer("", tool_calls=[call]), Answer("", tool_calls=[call]))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with Client() as client:
        whole = client.chat.create(messages=MESSAGES, tools=tools)
        streamed = client.chat.stream(messages=MESSAGES, tools=tools).final()
    for answer in (whole, streamed):
        (told,) = answer.choices[0].tool_calls
        assert (told.name, json.loads(told.arguments), answer.choices[0].finish_reason) == ("weather", {"city": "Paris"}, "tool_calls")
    assert manta_server.requests[0].tools == ["weather"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure("INVALID_ARGUMENT", "too hot", param="temperature"), BadRequest),
        (Failure("RESOURCE_EXHAUSTED", retry_after_s=60), Overloaded),
        (Failure("UNAVAILABLE"), Unavailable),
        (Failure("INTERNAL"), ServerError),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
@pytest.mark.parametrize("streamed", [False, True])
def test_failures_are_typed(manta_server: FakeServer, failure: Failure, kind: type, streamed: bool) -> None:
    manta_server.say(failure)
    with Client(max_retries=0) as client:
        ask = (lambda: client.chat.stream(messages=MESSAGES).final()) if streamed else (lambda: client.chat.create(messages=MESSAGES))
        with pytest.raises(kind) as caught:
            ask()
    error = caught.value
    assert (error.message, error.param, error.retry_after, error.reason) == (
        failure.message,
        failure.param,
        failure.retry_after_s,
        "scripted",
    )


def test_a_failure_that_passes_is_tried_again_under_the_same_key(manta_server: FakeServer) -> None:
    manta_server.say(Failure("RESOURCE_EXHAUSTED", retry_after_s=0.01), "There.")
    with Client() as client:
        assert client.chat.create(messages=MESSAGES).text == "There."
    first, second = manta_server.requests
    assert first.key == second.key != ""


def test_a_connection_that_is_lost_is_not_noticed(manta_server: FakeServer) -> None:
    manta_server.say(Answer("One two three", breaks_after=2), Answer("Four five", breaks_after=0))
    with Client() as client:
        with client.chat.stream(messages=MESSAGES) as stream:
            assert [delta.text for delta in stream if delta.text] == ["One", " two", " three"]
        assert client.chat.create(messages=MESSAGES).text == "Four five"
    assert [request.had for request in manta_server.requests] == [{}, {0: 2}, {}, {}]


def test_a_stream_can_fail_in_the_midst(manta_server: FakeServer) -> None:
    manta_server.say(Failure("INTERNAL", "oh", after=2))
    with Client() as client:
        stream = client.chat.stream(messages=MESSAGES)
        with pytest.raises(ServerError, match="oh"):
            list(stream)
    assert stream.text == "This is"


def test_the_same_key_is_the_same_answer(manta_server: FakeServer) -> None:
    manta_server.say("First.", "Second.")
    with Client() as client:
        told = [client.chat.create(messages=MESSAGES, idempotency_key="k").text for _ in range(2)]
    assert told == ["First.", "First."]


def test_models_tokens_and_the_administrators_calls() -> None:
    with FakeServer(models={"small": 512}) as server, Client(server.endpoint) as client:
        assert [(model.id, model.max_model_len) for model in client.models.list()] == [("small", 512)]
        with pytest.raises(NotFound):
            client.models.get("large")
        tokenized = client.tokens.tokenize("to be or not to be", return_tokens=True)
        assert tokenized.tokens == ("to", " be", " or", " not", " to", " be")
        assert client.tokens.detokenize(tokenized.token_ids) == "to be or not to be"
        assert client.tokens.tokenize(MESSAGES).max_model_len == 512
        with pytest.raises(BadRequest):
            client.tokens.detokenize([10_000])
        assert (client.admin.info().version, client.admin.abort("x"), client.admin.load().draining) == ("fake", 0, False)
        assert client.admin.drain() == 0
        with Client(server.endpoint, max_retries=0) as impatient, pytest.raises(Unavailable, match="drained"):
            impatient.chat.create(messages=MESSAGES)
        client.admin.drain(undo=True)
        assert client.chat.create(messages=MESSAGES).text == "This is a test."


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with FakeServer(api_key="secret") as server:
        with Client(server.endpoint) as client, pytest.raises(AuthenticationFailed):
            client.chat.create(messages=MESSAGES, model="fake")
        with Client(server.endpoint, api_key="secret") as client:
            assert client.chat.create(messages=MESSAGES).text == "This is a test."
        with openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="fake", messages=MESSAGES)


def test_openais_client_gets_the_same_script(manta_server: FakeServer) -> None:
    call = Call(name="weather")
    manta_server.say("Whole.", Answer("In pieces."), Answer("", tool_calls=[call]), Failure("INVALID_ARGUMENT", "hot", param="temperature"))
    with openai.OpenAI(base_url=manta_server.url, api_key="none", max_retries=1) as client:
        assert client.chat.completions.create(model="fake", messages=MESSAGES).choices[0].message.content == "Whole."
        chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "In pieces."
        assert chunks[-1].usage.completion_tokens == 2
        asked = client.chat.completions.create(model="fake", messages=MESSAGES).choices[0].message.tool_calls
        assert asked[0].function.name == "weather"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fake", messages=MESSAGES)
        assert caught.value.param == "temperature"
        assert client.completions.create(model="fake", prompt="Once", max_tokens=2).choices[0].text == "This is"
        assert [model.id for model in client.models.list()] == ["fake"]
        manta_server.say(Failure("UNAVAILABLE", retry_after_s=0.01), "Again.")
        assert client.chat.completions.create(model="fake", messages=MESSAGES).choices[0].message.content == "Again."
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=MESSAGES)
    assert manta_server.requests[0].protocol == "http"


def test_what_is_not_there_is_refused_over_http(manta_server: FakeServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{manta_server.url}/nothing")
    assert json.loads(caught.value.read())["error"]["code"] == "not_found"


def test_vectors_depend_on_the_text_alone_unless_the_script_has_them(manta_server: FakeServer) -> None:
    with Client() as client, openai.OpenAI(base_url=manta_server.url, api_key="none", max_retries=0) as http:
        first, again = (client.embeddings.create(input=["a text", [1, 2, 3]]) for _ in range(2))
        assert [one.vector for one in first.data] == [one.vector for one in again.data]
        assert first.data[0].vector != first.data[1].vector
        assert math.hypot(*first.vector) == pytest.approx(1)
        assert first.usage.prompt_tokens == 5
        for told in (http.embeddings.create(model="fake", input="a text"), http.embeddings.create(model="fake", input=["a text"])):
            assert told.data[0].embedding == pytest.approx(first.vector, abs=1e-6)
        short = client.embeddings.create(input="a text", dimensions=3).vector
        assert (len(short), math.hypot(*short)) == (3, pytest.approx(1))
        manta_server.say(Answer(vectors=[[0.0, 1.0]]), Failure("INVALID_ARGUMENT", "no"))
        assert client.embeddings.create(input="x").vector == (0.0, 1.0)
        with pytest.raises(BadRequest):
            client.embeddings.create(input="x")
    kinds = [(one.kind, one.protocol, one.prompts) for one in manta_server.requests]
    assert kinds[0] == ("embedding", "grpc", ["a text", (1, 2, 3)])
    assert kinds[2] == ("embedding", "http", ["a text"])
    assert manta_server.requests[0].key != manta_server.requests[1].key


def test_a_call_for_vectors_that_is_lost_is_made_again_under_its_key(manta_server: FakeServer) -> None:
    manta_server.say(Answer(vectors=[[1.0]], breaks_after=0), Answer(vectors=[[2.0]]))
    with Client() as client:
        assert client.embeddings.create(input="x").vector == (1.0,)
        assert client.embeddings.create(input="x", idempotency_key="mine").vector == (2.0,)
    assert len({one.key for one in manta_server.requests[:2]}) == 1
    assert manta_server.requests[2].key == "mine"
