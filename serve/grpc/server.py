"""Where the servicers are put on a server: Ray Serve's by import path, or a plain one of our own."""

from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.drain_gate import Doors
from serve.grpc.admin import AdminServicer, Fleet
from serve.grpc.auth import Admits
from serve.grpc.decode_errors import Forgiving
from serve.grpc.generated import admin_pb2_grpc, service_pb2_grpc
from serve.grpc.health import ADMIN, MANTA, HealthServicer
from serve.grpc.servicer import MantaServicer
from serve.limits import Limits
from serve.service_api import Offers

SERVICER_FUNCTIONS = (
    "serve.grpc.generated.service_pb2_grpc.add_MantaServiceServicer_to_server",
    "serve.grpc.generated.admin_pb2_grpc.add_AdminServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""For Ray Serve's `gRPCOptions.grpc_servicer_functions`. Its proxy then calls the front's methods of the services' names, with
(request, grpc_context); reflection is its own (`enable_reflection`)."""


async def start_server(
    service: Offers,
    address: str,
    *,
    fleets: Sequence[Fleet] = (),
    credentials: grpc.ServerCredentials | None = None,
    limits: Limits | None = None,
    door: Admits | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Serve on `address` ("127.0.0.1:0" takes a free port) without Ray Serve; the server and its port.

    A service within `Doors` is looked after as well, by the admin calls.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    limits = limits or Limits()
    server = grpc.aio.server(
        interceptors=(Forgiving(),),
        options=(
            ("grpc.max_receive_message_length", 2 * limits.body_bytes),  # up to there the servicer refuses, and says why
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.so_reuseport", 0),
        ),
    )
    service_pb2_grpc.add_MantaServiceServicer_to_server(MantaServicer(service, door=door), server)
    if isinstance(service, Doors):
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(service, fleets, door=door), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(service.ready), server)
    reflection.enable_server_reflection((MANTA, ADMIN, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    return server, port
