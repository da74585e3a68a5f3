"""Registers the servicers: with Ray Serve by import path, or with a plain gRPC server."""

from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.auth import Authenticator
from serve.drain_gate import DrainGate
from serve.grpc.admin import AdminServicer, Fleet
from serve.grpc.decode_errors import DecodeErrorInterceptor
from serve.grpc.generated import admin_pb2_grpc, service_pb2_grpc
from serve.grpc.health import ADMIN, MANTA, HealthServicer
from serve.grpc.servicer import MantaServicer
from serve.limits import Limits
from serve.service_api import ServiceApi

SERVICER_FUNCTIONS = (
    "serve.grpc.generated.service_pb2_grpc.add_MantaServiceServicer_to_server",
    "serve.grpc.generated.admin_pb2_grpc.add_AdminServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""For Ray Serve's `gRPCOptions.grpc_servicer_functions`. Its proxy then calls the front's methods by the names in the protocol, with
(request, grpc_context). Reflection is Ray Serve's own (`enable_reflection`)."""


async def start_server(
    service: ServiceApi,
    address: str,
    *,
    fleets: Sequence[Fleet] = (),
    credentials: grpc.ServerCredentials | None = None,
    limits: Limits | None = None,
    authenticator: Authenticator | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Serve on `address` without Ray Serve; port 0 takes a free one. Returns the server and its port.

    If ``service`` is a `DrainGate`, the admin calls are served too.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    limits = limits or Limits()
    server = grpc.aio.server(
        interceptors=(DecodeErrorInterceptor(),),
        options=(
            ("grpc.max_receive_message_length", 2 * limits.body_bytes),  # up to this size the servicer refuses, with a reason
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.so_reuseport", 0),
        ),
    )
    service_pb2_grpc.add_MantaServiceServicer_to_server(MantaServicer(service, authenticator=authenticator), server)
    if isinstance(service, DrainGate):
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(service, fleets, authenticator=authenticator), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(service.ready), server)
    reflection.enable_server_reflection((MANTA, ADMIN, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    return server, port
