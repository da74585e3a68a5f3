"""What the gRPC API promises, behind the real proxy of Ray Serve."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import ray
import ray.serve as ray_serve
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manta_client import AsyncClient, BadRequest, CallFailed, DeadlineExceeded, Overloaded, ServerError
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from serve import proxy_hook
from serve.grpc.server import SERVICER_FUNCTIONS
from tests.serve.grpc.scripted_front import ScriptedFront
from tests.system.server import free_ports

pytestmark = pytest.mark.system
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    variables = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN_PATH": str(folder / "no-token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        proxy_hook.CALLBACK_VARIABLE: proxy_hook.CALLBACK,
        proxy_hook.HOST_VARIABLE: "127.0.0.1",
    }
    http_port, port = free_ports(2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setitem(os.environ, name, value)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 << 20,
            _temp_dir=str(folder),
            _node_ip_address="127.0.0.1",
        )
        try:
            ray_serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host="127.0.0.1", port=http_port),
                grpc_options=gRPCOptions(port=port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
            )
            front = ray_serve.deployment(ScriptedFront, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
            ray_serve.run(front.bind(), name="scripted", route_prefix="/")
            yield f"127.0.0.1:{port}"
        finally:
            ray_serve.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"grpc://{address}", max_retries=0) as client:
        yield client


async def counted(client: AsyncClient) -> dict[str, int]:
    """What the front tells of itself as models' names."""
    told = [model.id.rpartition("-") for model in await client.models.list()]
    return {name: int(count) for name, _, count in told}


async def num_closed(client: AsyncClient) -> int:
    return (await counted(client))["closed"]


async def one_more_closed(client: AsyncClient, before: int) -> None:
    async with asyncio.timeout(60):
        while await num_closed(client) == before:  # noqa: ASYNC110 (it is another process that knows)
            await asyncio.sleep(0.05)


async def test_streams_pass_ray_as_soon_as_the_front_has_connected_and_are_the_same(client: AsyncClient) -> None:
    """So do those of all other tests here, whose promises are the same with and without."""
    async with asyncio.timeout(60):
        while (await counted(client))["past"] < 3:
            stream = client.chat.stream(model="tiny", messages=MESSAGES)
            assert [delta.text async for delta in stream] == ["H", "é", "!", ""]
            assert (await stream.final()).usage.completion_tokens == 3


async def test_the_streamed_answer_is_the_whole_one(client: AsyncClient) -> None:
    whole = await client.chat.create(model="tiny", messages=MESSAGES)
    stream = client.chat.stream(model="tiny", messages=MESSAGES)
    assert [delta.text async for delta in stream] == ["H", "é", "!", ""]
    assert (await stream.final()).text == whole.text == "Hé!"
    assert (await client.completions.create(model="tiny", prompt="Hi")).text == "Hé!"
    assert (await client.completions.stream(model="tiny", prompt=[1, 2]).final()).text == "Hé!"


async def refusal(client: AsyncClient, method: str, model: str) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await (
            client.chat.create(model=model, messages=MESSAGES)
            if method == "create"
            else client.chat.stream(model=model, messages=MESSAGES).final()
        )
    return caught.value


@pytest.mark.parametrize("method", ["create", "stream"])
@pytest.mark.parametrize("when", ["", "late-"])
async def test_a_refusal_arrives_with_everything_it_says(client: AsyncClient, method: str, when: str) -> None:
    bad, full, broken = [await refusal(client, method, f"{when}{name}") for name in ("bad", "full", "broken")]
    assert isinstance(bad, BadRequest)
    assert (bad.param, bad.reason) == ("temperature", "invalid_value")
    assert isinstance(full, Overloaded)
    assert full.retry_after == 2.5
    assert isinstance(broken, ServerError)
    assert "secret" not in str(broken)
    assert all(error.request_id and error.request_id.startswith("chatcmpl-") for error in (bad, full, broken))


async def test_a_stream_that_fails_has_a_status_that_says_so_too(address: str) -> None:
    """For clients that know nothing of error events."""
    from serve.grpc.generated import service_pb2, service_pb2_grpc

    async def read() -> None:
        async for _ in service_pb2_grpc.MantaServiceStub(channel).ChatStream(service_pb2.ChatStreamRequest(request={"model": "late-full"})):
            pass

    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())


async def test_a_cancel_arrives_at_the_service(client: AsyncClient) -> None:
    before = await num_closed(client)
    async with client.chat.stream(model="holds", messages=MESSAGES) as stream:
        assert (await anext(stream)).text == "H"
        assert await num_closed(client) == before
    await one_more_closed(client, before)


async def test_many_cancels_leave_the_proxy_alive(client: AsyncClient) -> None:
    """Whether a call is cancelled while its stream waits for a message or while one is sent is a matter of luck."""

    async def cancelled() -> None:
        async with client.chat.stream(model="holds", messages=MESSAGES) as stream:
            await anext(stream)

    before = await num_closed(client)
    for _ in range(10):
        await asyncio.gather(*(cancelled() for _ in range(8)))
    async with asyncio.timeout(30):
        while await num_closed(client) < before + 80:  # noqa: ASYNC110 (it is another process that knows)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("method", ["create", "stream"])
async def test_a_deadline_arrives_at_the_service(client: AsyncClient, method: str) -> None:
    before = await num_closed(client)
    asked = {"model": "holds", "messages": MESSAGES, "timeout": 0.7}
    with pytest.raises(DeadlineExceeded):
        await (client.chat.create(**asked) if method == "create" else client.chat.stream(**asked).final())
    await one_more_closed(client, before)


async def test_health_is_answered(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest(service="manta.v1.MantaService")))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_death_of_a_front_is_a_status_behind_all_that_it_had_sent(client: AsyncClient) -> None:
    before, texts, past = (await counted(client))["past"], list[str](), list[int]()

    async def read() -> None:
        async for delta in client.chat.stream(model="dies", messages=MESSAGES):
            texts.append(delta.text)
            past.append((await counted(client))["past"] if not past else past[0])

    with pytest.raises(CallFailed) as caught:
        await read()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert texts == ["H", "é"]
    assert past[0] == before + 1
