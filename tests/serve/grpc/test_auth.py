"""Who is let in over gRPC."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from serve.auth import KeyAuthenticator
from serve.errors import QuotaExceeded
from serve.grpc.generated import messages_pb2, service_pb2, service_pb2_grpc
from serve.grpc.server import start_server
from serve.key_file import locked_key_file, new_key
from tests.serve.grpc.conftest import ScriptedService

CHAT = service_pb2.ChatRequest(model="tiny", messages=[messages_pb2.Message(role=messages_pb2.ROLE_USER, content="Hi")])


@pytest.fixture
def key(tmp_path: Path) -> str:
    (shown, key), (other, watcher) = new_key(), new_key(scopes=["metrics"])
    with locked_key_file(tmp_path / "keys.json") as write:
        write((key, watcher))
    (tmp_path / "metrics-key").write_text(other)
    return shown


@pytest.fixture
async def channel(service: ScriptedService, key: str, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server, port = await start_server(service, "127.0.0.1:0", authenticator=KeyAuthenticator(tmp_path / "keys.json"))  # type: ignore[arg-type]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


def shown(value: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", value),)


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_the_owner_of_a_key_is_answered(channel: grpc.aio.Channel, service: ScriptedService, key: str) -> None:
    stub = service_pb2_grpc.MantaServiceStub(channel)
    await stub.Chat(CHAT, metadata=shown(f"Bearer {key}"))
    assert service.asked[0].caller.id
    assert [event async for event in stub.ChatStream(service_pb2.ChatStreamRequest(request=CHAT), metadata=shown(f"Bearer {key}"))]


@pytest.mark.parametrize("how", ["nothing", "wrong", "Basic", "twice"])
async def test_everybody_else_is_refused_alike(channel: grpc.aio.Channel, service: ScriptedService, key: str, how: str) -> None:
    metadata = {"nothing": (), "wrong": shown("Bearer wrong"), "Basic": shown(f"Basic {key}"), "twice": shown(f"Bearer {key}") * 2}[how]
    stub = service_pb2_grpc.MantaServiceStub(channel)
    errors = [
        await refused(stub.Chat(CHAT, metadata=metadata)),
        await refused(
            stub.Generate(service_pb2.GenerateRequest(model="tiny", prompts=[messages_pb2.Prompt(text="Hi")]), metadata=metadata)
        ),
        await refused(stub.ListModels(service_pb2.ListModelsRequest(), metadata=metadata)),
        await refused(stub.GetModel(service_pb2.GetModelRequest(model="tiny"), metadata=metadata)),
    ]
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        [event async for event in stub.ChatStream(service_pb2.ChatStreamRequest(request=CHAT), metadata=metadata)]
    assert {error.code() for error in (*errors, streamed.value)} == {grpc.StatusCode.UNAUTHENTICATED}
    assert len({error.details() for error in errors}) == 1
    assert not service.asked


async def test_a_key_for_something_else_is_not_enough(channel: grpc.aio.Channel, tmp_path: Path) -> None:
    stub = service_pb2_grpc.MantaServiceStub(channel)
    error = await refused(stub.Chat(CHAT, metadata=shown(f"Bearer {(tmp_path / 'metrics-key').read_text()}")))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_health_needs_no_key(channel: grpc.aio.Channel) -> None:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_used_up_quota_is_told_with_its_details(channel: grpc.aio.Channel, service: ScriptedService, key: str) -> None:
    service.error, service.fails_at = QuotaExceeded("tokens per minute", limit=60, retry_after_s=2.5), 0
    error = await refused(service_pb2_grpc.MantaServiceStub(channel).Chat(CHAT, metadata=shown(f"Bearer {key}")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for detail in status.details:
        for kind in (ErrorInfo, QuotaFailure, RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = kind.FromString(detail.value)
    assert found[ErrorInfo].reason == "RATE_LIMIT_EXCEEDED"
    assert found[QuotaFailure].violations[0].description == "tokens per minute"
    assert found[RetryInfo].retry_delay.ToNanoseconds() == 2_500_000_000
