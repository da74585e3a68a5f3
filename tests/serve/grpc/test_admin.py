"""Looking after a running server: what it says of itself, ending a request, draining; and that whatever ends a call frees the engine."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import httpx
import pytest
from manta_client import AsyncClient, CallFailed, DeadlineExceeded, ServerError, Unavailable

from cluster.health import State
from serve.grpc.generated import admin_pb2, admin_pb2_grpc
from tests.serve.in_process import MODEL, NUM_BLOCKS, Fronts

MESSAGES = [{"role": "user", "content": "Hi"}]
LONG = {"model": MODEL, "messages": MESSAGES, "max_tokens": 900, "ignore_eos": True}


@pytest.fixture
async def admin(both: Fronts) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    async with grpc.aio.insecure_channel(both.grpc.removeprefix("grpc://")) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


@pytest.fixture
async def client(both: Fronts) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(both.grpc, max_retries=0, timeout=60) as client:
        yield client


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (an engine's thread tells nobody)
            await asyncio.sleep(0.01)


async def load(admin: admin_pb2_grpc.AdminServiceStub) -> admin_pb2.ReplicaLoad:
    (replica,) = (await admin.GetLoad(admin_pb2.GetLoadRequest())).replicas
    return replica


async def test_a_server_says_what_it_is(admin: admin_pb2_grpc.AdminServiceStub) -> None:
    info = await admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
    assert info.version
    assert info.started.seconds > 1_700_000_000
    assert [model.id for model in info.models] == [MODEL]
    (replica,) = info.replicas
    assert (replica.state, replica.kv_blocks, replica.block_tokens) == (admin_pb2.REPLICA_STATE_READY, NUM_BLOCKS, 16)
    assert info.limits["body_bytes"] == 4 * 1024 * 1024
    assert not info.draining


@pytest.mark.parametrize("state", list(State))
def test_every_state_of_a_replica_has_a_word_in_the_protocol(state: State) -> None:
    assert admin_pb2.ReplicaState.Value(f"REPLICA_STATE_{state.name}") > 0


async def running_blocks(both: Fronts) -> None:
    await eventually(lambda: both.source.engine.stats.num_running > 0 and both.source.engine.stats.blocks_used > 0)


@pytest.mark.parametrize("how", ["close", "deadline", "cancel unary"])
async def test_whatever_ends_a_call_frees_its_blocks_in_the_engine(both: Fronts, client: AsyncClient, admin, how: str) -> None:
    before = await load(admin)
    assert (before.running, before.waiting, before.kv_blocks_used) == (0, 0, 0)
    if how == "close":
        async with client.chat.stream(**LONG, n=2) as stream:
            await anext(stream)
            await eventually(lambda: both.source.engine.stats.num_running == 2)
            assert (await load(admin)).kv_blocks_used >= 2
    elif how == "deadline":
        with pytest.raises(DeadlineExceeded):
            await client.chat.create(**LONG, timeout=0.3)
    else:
        asking = asyncio.create_task(client.chat.create(**LONG))
        await running_blocks(both)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: both.source.is_idle)
    after = await load(admin)
    assert (after.running, after.waiting, after.kv_blocks_used) == (0, 0, 0)
    assert both.gate.num_open == 0
    assert both.source.engine.stats.sampled_tokens < 900


@pytest.mark.parametrize("front", ["grpc stream", "grpc", "http"])
async def test_an_aborted_request_ends_with_an_error_that_says_so(both: Fronts, client: AsyncClient, admin, front: str) -> None:
    async def ask() -> object:
        if front == "http":
            async with httpx.AsyncClient(base_url=both.http, timeout=60) as http:
                return await http.post("/v1/chat/completions", json=LONG)
        return await (client.chat.stream(**LONG).final() if front == "grpc stream" else client.chat.create(**LONG))

    asking = asyncio.create_task(ask())
    await running_blocks(both)
    (request_id, _), *_ = both.source._streams
    assert (await admin.Abort(admin_pb2.AbortRequest(request_id=request_id))).choices == 1
    (outcome,) = await asyncio.gather(asking, return_exceptions=True)
    if front == "http":
        assert (outcome.status_code, outcome.json()["error"]["code"]) == (410, "request_aborted")
    else:
        assert isinstance(outcome, ServerError)
        assert (outcome.code, outcome.reason, outcome.request_id) == (grpc.StatusCode.ABORTED, "request_aborted", request_id)
    await eventually(lambda: both.source.is_idle)


async def test_a_request_that_is_not_there_is_not_aborted(admin) -> None:
    assert (await admin.Abort(admin_pb2.AbortRequest(request_id="chatcmpl-other"))).choices == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Abort(admin_pb2.AbortRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_draining_server_lets_the_running_end_and_takes_nobody_in(both: Fronts, client: AsyncClient, admin) -> None:
    stream = client.chat.stream(**LONG)
    await anext(stream)
    assert (await admin.Drain(admin_pb2.DrainRequest())).open_requests == 1
    with pytest.raises(Unavailable) as refused:
        await client.chat.create(**LONG)
    assert (refused.value.reason, refused.value.retry_after) == ("draining", 1.0)
    async with httpx.AsyncClient(base_url=both.http) as http:
        assert (await http.get("/readyz")).status_code == 503
        answer = await http.post("/v1/chat/completions", json=LONG)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        embeddings = {"model": MODEL, "input": "a"}
        assert (await http.post("/v1/embeddings", json=embeddings)).status_code == 503
    stream_too = client.chat.stream(**LONG)
    with pytest.raises(Unavailable):
        await stream_too.final()
    assert both.refused == [MODEL] * 4, "each of them is told of"
    assert len((await stream.final()).choices[0].token_ids) == 900
    assert (await admin.GetLoad(admin_pb2.GetLoadRequest())).draining
    assert (await admin.Drain(admin_pb2.DrainRequest(undo=True))).open_requests == 0
    assert both.gate.ready()
    await client.chat.create(model=MODEL, messages=MESSAGES, max_tokens=2)


async def test_a_failed_call_is_the_servers_to_explain(client: AsyncClient) -> None:
    with pytest.raises(CallFailed) as caught:
        await client.chat.create(model="other", messages=MESSAGES)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
