"""What clients see of requests that still run when the server is stopped."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from manta_client import AsyncClient, Unavailable

from serve.drain_gate import DrainGate
from serve.errors import ServerStopped
from serve.grpc.generated import service_pb2, service_pb2_grpc
from serve.request import AnyRequest, ChatRequest, Message, Options, TextEvent, Usage
from serve.request_observer import failure_code
from tests.serve.in_process import MODEL, Fronts, fronts

MESSAGES = [{"role": "user", "content": "Hi"}]
LONG = {"model": MODEL, "messages": MESSAGES, "max_tokens": 900, "ignore_eos": True}
LONGEST = Options(max_tokens=900, ignore_eos=True)
SHORT = LONG | {"max_tokens": 20}
CHATS = "/v1/chat/completions"


@pytest.fixture(autouse=True)
async def reopened(both: Fronts) -> AsyncIterator[None]:
    yield
    both.gate._stopping = both.gate.has_ended_requests = False
    both.gate.reopen()


async def begun(both: Fronts) -> None:
    async with asyncio.timeout(60):
        while not both.gate.num_open:  # noqa: ASYNC110 (nobody is told)
            await asyncio.sleep(0.01)


async def test_an_http_stream_ends_with_an_error_event_and_its_connection_in_order(both: Fronts) -> None:
    async with httpx.AsyncClient(base_url=both.http) as http, http.stream("POST", CHATS, json=LONG | {"stream": True}) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        await both.gate.end_requests(0.0)
        rest = [line async for line in lines if line]  # raises where the connection just breaks
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert "assistant" in first
    assert (error["code"], error["type"]) == ("draining", "server_error")
    assert "stopped before the answer was complete" in error["message"]


async def test_a_response_of_openais_newer_api_fails_in_its_own_words(both: Fronts) -> None:
    body = {"model": MODEL, "input": "Hi", "max_output_tokens": 900, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(base_url=both.http) as http, http.stream("POST", "/v1/responses", json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await both.gate.end_requests(0.0)
        names = [line.removeprefix("event: ") async for line in lines if line.startswith("event: ")]
    assert names[-2:] == ["error", "response.failed"]


async def test_an_answer_that_is_not_streamed_is_an_error_that_may_be_tried_again(both: Fronts) -> None:
    async with httpx.AsyncClient(base_url=both.http) as http:
        asking = asyncio.create_task(http.post(CHATS, json=LONG))
        await begun(both)
        await both.gate.end_requests(0.0)
        answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "draining", "1")


async def test_a_grpc_stream_ends_unavailable_with_the_details(both: Fronts) -> None:
    async with AsyncClient(both.grpc, max_retries=0) as client:
        stream = client.chat.stream(**LONG)
        await anext(stream)
        await both.gate.end_requests(0.0)
        with pytest.raises(Unavailable) as caught:
            await stream.final()
    assert (caught.value.reason, caught.value.retry_after) == ("draining", 1.0)


async def read_on(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_its_status_says_so_too(both: Fronts) -> None:
    message = {"role": "ROLE_USER", "content": "Hi"}
    options = {"max_tokens": 900, "ignore_eos": True}
    request = service_pb2.ChatStreamRequest(request={"model": MODEL, "messages": [message], "options": options})
    async with grpc.aio.insecure_channel(both.grpc.removeprefix("grpc://")) as channel:
        call = service_pb2_grpc.MantaServiceStub(channel).ChatStream(request)
        await call.read()
        await both.gate.end_requests(0.0)
        with pytest.raises(grpc.aio.AioRpcError):
            await read_on(call)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "grpc-status-details-bin" in dict(await call.trailing_metadata())


async def test_within_the_grace_streams_end_as_ever(both: Fronts) -> None:
    async with AsyncClient(both.grpc, max_retries=0) as client:
        stream = client.chat.stream(**SHORT)
        await anext(stream)
        ending = asyncio.create_task(both.gate.end_requests(60.0))
        assert len((await stream.final()).choices[0].token_ids) == 20
        await ending
        with pytest.raises(Unavailable, match="takes no new requests"):
            await client.chat.create(**SHORT)


async def test_the_grace_can_be_cut_short(both: Fronts) -> None:
    async with AsyncClient(both.grpc, max_retries=0) as client:
        stream = client.chat.stream(**LONG)
        await anext(stream)
        ending = asyncio.create_task(both.gate.end_requests(1e9))
        await both.gate.end_requests(0.0)
        with pytest.raises(Unavailable, match="was stopped"):
            await stream.final()
        await ending


async def test_the_grace_ends_where_its_call_is_cancelled_and_the_gate_stays_closed(both: Fronts) -> None:
    """What a second Ctrl-C does on a cluster, where the fronts take no further calls (`serve.stop_requests`)."""
    async with AsyncClient(both.grpc, max_retries=0) as client:
        stream = client.chat.stream(**LONG)
        await anext(stream)
        ending = asyncio.create_task(both.gate.end_requests(1e9))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(Unavailable, match="was stopped"):
            await stream.final()
        both.gate.reopen()
        assert both.gate.draining


class Failures:
    """An observer: how every request failed."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def begin(self, request: AnyRequest) -> "Failures":
        return self

    def event(self, event: TextEvent) -> None: ...

    def ended(self) -> None:
        self.codes.append("")

    def failed(self, error: BaseException) -> None:
        self.codes.append(failure_code(error))


async def test_requests_that_the_server_ends_are_told_from_those_whose_clients_left(tiny_folder: Path) -> None:
    failures = Failures()
    async with (
        fronts(tiny_folder, observers=[failures]) as running,
        httpx.AsyncClient(base_url=running.http) as http,
        AsyncClient(running.grpc, max_retries=0) as client,
    ):
        leaving = client.chat.stream(**LONG)
        await anext(leaving)
        await leaving.close()
        async with asyncio.timeout(60):
            while failures.codes != ["client_left"]:  # noqa: ASYNC110 (nobody is told)
                await asyncio.sleep(0.01)
        streams = [client.chat.stream(**LONG), client.chat.stream(**LONG, idempotency_key="k")]
        for stream in streams:
            await anext(stream)
        collected = [asyncio.create_task(http.post(CHATS, json=LONG, headers=headers)) for headers in ({}, {"idempotency-key": "l"})]
        async with asyncio.timeout(60):
            while running.gate.num_open < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        unread = running.gate.chat(
            ChatRequest(request_id="u", model=MODEL, messages=(Message(role="user", content="Hi"),), options=LONGEST)
        )
        await anext(unread)
        await running.gate.end_requests(0.0)
        with pytest.raises(ServerStopped):
            [event async for event in unread]
        for stream in streams:
            with pytest.raises(Unavailable):
                await stream.final()
        assert [(await each).status_code for each in collected] == [503, 503]
    assert failures.codes == ["client_left", *["stopped"] * 5]


class Endless:
    """A service whose stream has an event, and then waits for ever."""

    closed = False

    async def chat(self, request: ChatRequest) -> AsyncIterator[TextEvent]:
        try:
            yield TextEvent(choice=0, text="a")
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_a_stream_that_nobody_reads_at_the_moment_ends_where_it_is_read_on() -> None:
    inner = Endless()
    gate = DrainGate(inner)  # type: ignore[arg-type]
    events = gate.chat(ChatRequest(request_id="r", model=MODEL, messages=()))
    assert (await anext(events)).text == "a"
    ending = asyncio.create_task(gate.end_requests(0.0))
    await asyncio.sleep(0.1)
    with pytest.raises(ServerStopped):
        await anext(events)
    await ending
    assert inner.closed
    assert asyncio.current_task().cancelling() == 0


async def test_a_client_that_goes_at_the_same_moment_is_not_told_of_an_error() -> None:
    inner = Endless()
    gate = DrainGate(inner)  # type: ignore[arg-type]
    events = gate.chat(ChatRequest(request_id="r", model=MODEL, messages=()))
    await anext(events)
    reading = asyncio.create_task(anext(events))
    await asyncio.sleep(0)
    ending = asyncio.create_task(gate.end_requests(0.0))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await ending
    assert inner.closed


async def test_an_answer_whose_last_event_has_passed_is_not_ended_with_an_error() -> None:
    class Finished:
        async def chat(self, request: ChatRequest) -> AsyncIterator[TextEvent]:
            yield TextEvent(choice=0, usage=Usage(prompt_tokens=1, completion_tokens=1))

    gate = DrainGate(Finished())  # type: ignore[arg-type]
    events = gate.chat(ChatRequest(request_id="r", model=MODEL, messages=()))
    await anext(events)
    ending = asyncio.create_task(gate.end_requests(0.0))
    await asyncio.sleep(0.1)
    assert [event async for event in events] == []
    await ending
