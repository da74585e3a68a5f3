import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.serve.grpc.conftest import ScriptedService

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def ask(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("name", ["", "manta.v1.MantaService"])
async def test_health_follows_readiness(channel, service: ScriptedService, name: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(ask(name))).status == SERVING
    service.is_ready = False
    assert (await health.Check(ask(name))).status == NOT_SERVING
    assert set((await health.List(health_pb2.HealthListRequest())).statuses) == {"", "manta.v1.MantaService", "manta.v1.AdminService"}


async def test_an_unknown_service_is_not_found(channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_pb2_grpc.HealthStub(channel).Check(ask("other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_is_told_of_changes_only(channel, service: ScriptedService) -> None:
    watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(ask()))
    assert (await anext(watch)).status == SERVING
    service.is_ready = False
    assert (await asyncio.wait_for(anext(watch), 60)).status == NOT_SERVING
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(watch), 1.2)


async def test_a_watcher_of_an_unknown_service_is_told_so_and_kept(channel) -> None:
    watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(ask("other")))
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_reflection_names_the_services(channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    response = await anext(aiter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))))
    names = {service.name for service in response.list_services_response.service}
    assert names >= {"manta.v1.MantaService", "grpc.health.v1.Health"}
