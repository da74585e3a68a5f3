"""The asynchronous client and its twin against one scripted server."""

import asyncio
import importlib
import inspect
import time

import grpc
import manta_client
import pytest
from manta_client import AsyncClient, BadRequest, Client, DeadlineExceeded, ModelNotChosen, NotFound, Overloaded, StreamBroken, Unavailable
from manta_client._generated import messages_pb2, service_pb2

from .conftest import USAGE, Refusal, Script, whole_answer

MESSAGES = [{"role": "user", "content": "Why?"}]
TEXT = "The sky is blue"


class Twin:
    """Both clients by one interface: what the synchronous one returns at once is awaited of the other."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __call__(self, *args, **kwargs):
        return self.kind(*args, **kwargs)

    async def get(self, function, *args, **kwargs):
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    async def list(self, stream) -> list:
        if hasattr(stream, "__aiter__"):
            return [delta async for delta in stream]
        return await asyncio.to_thread(lambda: list(stream))

    async def next(self, stream):
        return await self.get(stream.__anext__ if hasattr(stream, "__anext__") else stream.__next__)


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def twin(request: pytest.FixtureRequest) -> Twin:
    return Twin(request.param)


@pytest.fixture
async def client(twin: Twin, endpoint: str):
    client = twin(endpoint)
    yield client
    await twin.get(client.close)


async def test_a_chat_is_answered(twin: Twin, client, script: Script) -> None:
    answer = await twin.get(client.chat.create, model="qwen2", messages=MESSAGES, temperature=0, max_tokens=4)
    assert (answer.text, answer.id, answer.usage.total_tokens) == (TEXT, "chatcmpl-7", 7)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason is None
    assert isinstance(answer.raw, service_pb2.ChatResponse)
    (request,) = script.requests("Chat")
    assert request.options == messages_pb2.Options(temperature=0, max_tokens=4, seed=request.options.seed)


async def test_a_prompt_is_gone_on_with(twin: Twin, client) -> None:
    answer = await twin.get(client.completions.create, prompt="Why?")
    assert (answer.text, answer.choices[0].finish_reason, answer.choices[0].stop_reason) == (TEXT, "length", "x")


@pytest.mark.parametrize("kind", ["chat", "completions"])
async def test_the_streamed_answer_is_the_whole_one(twin: Twin, client, kind: str) -> None:
    resource = getattr(client, kind)
    asked = {"messages": MESSAGES} if kind == "chat" else {"prompt": "Why?"}
    stream = resource.stream(**asked)
    assert (stream.text, stream.id, stream.usage) == ("", "", None)
    deltas = await twin.list(stream)
    assert "".join(delta.text for delta in deltas) == stream.text == TEXT
    assert [delta.offset for delta in deltas] == [0, 1, 2, 3, 4]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, None, "stop"]
    final = await twin.get(stream.final)
    assert (final.text, final.id, final.usage, final.choices[0].token_ids) == (TEXT, "chatcmpl-7", stream.usage, (0, 1, 2, 3))


async def test_final_reads_what_was_not_read(twin: Twin, client) -> None:
    stream = client.chat.stream(messages=MESSAGES)
    await twin.next(stream)
    assert (await twin.get(stream.final)).text == TEXT


async def test_leaving_a_stream_early_cancels_it_at_the_server(twin: Twin, client, script: Script) -> None:
    script.pause_before[2] = script.cancelled
    stream = client.chat.stream(messages=MESSAGES)
    if twin.kind is AsyncClient:
        async with stream:
            assert (await anext(stream)).text == "The"
    else:
        with stream:
            assert (await asyncio.to_thread(next, stream)).text == "The"
    assert await asyncio.to_thread(script.cancelled.wait, 60)
    assert await twin.list(stream) == []
    with pytest.raises(StreamBroken):
        await twin.get(stream.final)


async def test_closing_from_elsewhere_ends_a_reader_that_waits(twin: Twin, client, script: Script) -> None:
    script.pause_before[1] = script.cancelled
    stream = client.chat.stream(messages=MESSAGES)
    assert (await twin.next(stream)).text == "The"
    reading = asyncio.create_task(twin.list(stream))
    await asyncio.sleep(0.1)
    assert not reading.done()
    await twin.get(stream.close)
    assert await asyncio.wait_for(reading, 60) == []


async def test_cancelling_the_reading_task_cancels_the_call(endpoint: str, script: Script) -> None:
    script.pause_before[1] = script.cancelled
    async with AsyncClient(endpoint) as client:
        reading = asyncio.create_task(client.chat.stream(messages=MESSAGES).final())
        await asyncio.to_thread(script.streaming.wait, 5)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(script.cancelled.wait, 60)


async def test_a_stream_closed_before_it_began_never_calls(twin: Twin, client, script: Script) -> None:
    stream = client.chat.stream(messages=MESSAGES)
    await twin.get(stream.close)
    assert await twin.list(stream) == []
    with pytest.raises(StreamBroken, match="before it began"):
        await twin.get(stream.final)
    assert script.calls == []


async def test_the_only_model_is_asked_for_once_and_taken(twin: Twin, client, script: Script) -> None:
    await twin.get(client.chat.create, messages=MESSAGES)
    await twin.get(client.chat.create, messages=MESSAGES)
    assert [request.model for request in script.requests("Chat")] == ["qwen2", "qwen2"]
    assert len(script.requests("ListModels")) == 1


async def test_among_several_models_one_must_be_named(twin: Twin, client, script: Script) -> None:
    script.models = ["small", "large"]
    with pytest.raises(ModelNotChosen, match="small, large"):
        await twin.get(client.chat.create, messages=MESSAGES)


async def test_models_are_listed_and_found(twin: Twin, client) -> None:
    (model,) = await twin.get(client.models.list)
    assert (model.id, model.max_model_len) == ("qwen2", 64)
    assert (await twin.get(client.models.get, "qwen2")).id == "qwen2"
    with pytest.raises(NotFound) as caught:
        await twin.get(client.models.get, "none")
    assert caught.value.param == "model"


async def test_an_error_says_code_reason_place_and_request(twin: Twin, client, script: Script) -> None:
    script.refusals = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "too hot", param="temperature")]
    with pytest.raises(BadRequest) as caught:
        await twin.get(client.chat.create, messages=MESSAGES)
    error = caught.value
    assert (error.code, error.reason, error.param) == (grpc.StatusCode.INVALID_ARGUMENT, "scripted_invalid_argument", "temperature")
    assert (error.message, error.request_id, error.retry_after) == ("too hot", "chatcmpl-7", None)
    assert len(script.requests("Chat")) == 1


@pytest.mark.parametrize("method", ["create", "stream"])
async def test_a_busy_server_is_tried_again_after_the_time_it_names(twin: Twin, client, script: Script, method: str) -> None:
    script.refusals = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.3)]
    before = time.monotonic()
    if method == "create":
        await twin.get(client.chat.create, messages=MESSAGES)
    else:
        assert (await twin.get(client.chat.stream(messages=MESSAGES).final)).text == TEXT
    assert time.monotonic() - before >= 0.3


async def test_a_server_that_stays_busy_is_given_up_and_its_time_is_told(twin: Twin, client, script: Script) -> None:
    script.refusals = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.01)] * 3
    with pytest.raises(Overloaded) as caught:
        await twin.get(client.chat.create, messages=MESSAGES)
    assert caught.value.retry_after == 0.01
    assert len(script.requests("Chat")) == 3


async def test_a_first_event_that_is_a_passing_error_is_tried_again(twin: Twin, client, script: Script) -> None:
    busy = {"error": messages_pb2.Error(code=14, reason="NOT_READY", message="loading")}
    script.events = [busy]
    stream = client.chat.stream(messages=MESSAGES)
    script.next_events = [*whole_answer(), USAGE]
    assert (await twin.get(stream.final)).text == TEXT
    assert len(script.requests("ChatStream")) == 2


async def test_without_retries_a_stream_that_broke_is_not_gone_on_with(twin: Twin, endpoint: str, script: Script) -> None:
    script.events = [*whole_answer()[:2], {"error": messages_pb2.Error(code=14, reason="UNAVAILABLE", message="lost")}]
    client = twin(endpoint, max_retries=0)
    stream = client.chat.stream(messages=MESSAGES)
    with pytest.raises(Unavailable, match="lost"):
        await twin.list(stream)
    assert stream.text == "The sky"
    assert len(script.requests("ChatStream")) == 1
    await twin.get(client.close)


async def test_a_stream_that_ends_without_its_end_is_broken(twin: Twin, endpoint: str, script: Script) -> None:
    script.events = whole_answer()[:3]
    client = twin(endpoint, max_retries=0)
    with pytest.raises(StreamBroken):
        await twin.list(client.chat.stream(messages=MESSAGES))
    await twin.get(client.close)


async def test_a_timeout_ends_the_call_at_both_sides(twin: Twin, client, script: Script) -> None:
    script.pause_before[2] = script.cancelled
    before = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await twin.list(client.chat.stream(model="qwen2", messages=MESSAGES, timeout=0.5))
    assert time.monotonic() - before < 30
    assert await asyncio.to_thread(script.cancelled.wait, 60)


async def test_no_server_is_said_to_be_unavailable(twin: Twin) -> None:
    client = twin("grpc://127.0.0.1:1", max_retries=0)
    with pytest.raises(Unavailable):
        await twin.get(client.chat.create, messages=MESSAGES)
    await twin.get(client.close)


async def test_the_key_is_shown_with_every_call(twin: Twin, endpoint: str, script: Script) -> None:
    client = twin(endpoint, api_key="secret")
    await twin.get(client.chat.create, messages=MESSAGES)
    await twin.get(client.close)
    assert [metadata["authorization"] for _, _, metadata in script.calls] == ["Bearer secret"] * 2
    assert "secret" not in repr(client)


@pytest.mark.parametrize(
    "name", ["chat.Chat", "completions.Completions", "models.Models", "tokens.Tokens", "admin.Admin", "stream.Stream", "client.Client"]
)
def test_the_twins_offer_the_same(name: str) -> None:
    def offer(kind: type) -> dict[str, list[str]]:
        public = {key: value for key, value in vars(kind).items() if inspect.isfunction(value) and not key.startswith("_")}
        return {key: list(inspect.signature(value).parameters) for key, value in public.items()}

    module, kind = name.split(".")
    asynchronous = getattr(importlib.import_module(f"manta_client._async.{module}"), f"Async{kind}")
    synchronous = getattr(importlib.import_module(f"manta_client._sync.{module}"), kind)
    assert offer(asynchronous) == offer(synchronous) != {}


def test_all_that_is_offered_is_there() -> None:
    assert all(hasattr(manta_client, name) for name in manta_client.__all__)
