"""`grpc.health.v1`, answered from the service's readiness at the time of each call, so that it is never out of date."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer as HealthBase

from serve.grpc.errors import CallContext
from serve.grpc.generated import admin_pb2, service_pb2

MANTA = service_pb2.DESCRIPTOR.services_by_name["MantaService"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
KNOWN = ("", MANTA, ADMIN)
"""The services that can be asked about; "" is the server."""


class HealthServicer(HealthBase):  # type: ignore[misc]
    def __init__(self, ready: Callable[[], bool], *, watch_interval_s: float = 0.5) -> None:
        self._ready, self._watch_interval_s = ready, watch_interval_s

    async def Check(self, request: HealthCheckRequest, context: CallContext) -> HealthCheckResponse:
        if request.service not in KNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("no such service")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: CallContext) -> AsyncGenerator[HealthCheckResponse, None]:
        sent = None
        while True:
            status = self._status(request.service)
            if status != sent:
                yield HealthCheckResponse(status=status)
                sent = status
            await asyncio.sleep(self._watch_interval_s)

    async def List(self, request: HealthListRequest, context: CallContext) -> HealthListResponse:
        return HealthListResponse(statuses={service: HealthCheckResponse(status=self._status(service)) for service in KNOWN})

    def _status(self, service: str) -> "HealthCheckResponse.ServingStatus":
        if service not in KNOWN:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._ready() else HealthCheckResponse.NOT_SERVING
