"""Run by every Ray Serve proxy before it listens: its gRPC port gets address and TLS, headers not meant for clients are stripped,
bytes that are no protobuf message reach our own refusal, pieces of streams come past Ray, clients that do not read are left, and a
front's death is told as our error.

Ray Serve 2.60 binds HTTP where it is told and gRPC to every address of the host, with no setting for it. The one place
where it runs code of ours in the proxy before that is the callback named by `CALLBACK_VARIABLE`.
"""

import asyncio
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve.proxy_hook.before_listening"
HOST_VARIABLE = "MANTA_PROXY_GRPC_HOST"
"""Environment of the proxy's process: the address for gRPC. Unset = 127.0.0.1."""
TLS_VARIABLES = {"certificate": "MANTA_PROXY_GRPC_CERTIFICATE", "key": "MANTA_PROXY_GRPC_KEY", "client_ca": "MANTA_PROXY_GRPC_CLIENT_CA"}
"""Environment of the proxy's process: PEM files for TLS on the gRPC port. Without the first two it is in the clear."""
SLOW_VARIABLE = "MANTA_PROXY_SLOW_CLIENT_TIMEOUT_S"
"""Environment of the proxy's process: how long a client may read nothing of what waits for it. Unset = `SLOW_CLIENT_TIMEOUT_S`."""
SLOW_CLIENT_TIMEOUT_S = 60.0
SEND_BUFFER_BYTES = 256 * 1024
"""Of a connection, in the kernel, which by itself would let megabytes wait there for each client that does not read."""
EVERY_ADDRESS = "[::]"
GRPC_MESSAGE_BYTES = 64 << 20
"""Ray Serve has one limit for both directions, 2 GiB unless told: enough for the largest answer with log-probabilities. A request
above `limits.body_bytes` is refused by us, one above this by gRPC."""
PROXY_CHECK_PERIOD_S = 1.0
"""A proxy is replaced when it was found dead three times in a row, or three times did not answer within ten seconds. Ray Serve asks
every ten seconds unless told. (Fronts and replicas have a period of their own, `serve.deployment.HEALTH_CHECK_PERIOD_S`.)"""


def variables(
    *, grpc_host: str, tls: Mapping[str, str | None] | None = None, slow_client_timeout_s: float = SLOW_CLIENT_TIMEOUT_S
) -> Mapping[str, str]:
    """What Ray Serve's controller and proxies must find in their environment: on a cluster, that of `ray start` on every host.

    ``tls``: file by role, as in `TLS_VARIABLES`.
    """
    return {
        CALLBACK_VARIABLE: CALLBACK,
        HOST_VARIABLE: grpc_host,
        **{TLS_VARIABLES[role]: file for role, file in (tls or {}).items() if file},
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(GRPC_MESSAGE_BYTES),
        **({} if slow_client_timeout_s == SLOW_CLIENT_TIMEOUT_S else {SLOW_VARIABLE: f"{slow_client_timeout_s:g}"}),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": f"{PROXY_CHECK_PERIOD_S:g}",
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
    }


def before_listening() -> list[Any]:
    """Called by the proxy for its HTTP middlewares."""
    import ray
    from ray.serve._private import default_impl, http_util
    from ray.serve._private import proxy as _proxy
    from ray.serve._private.grpc_util import gRPCGenericServer

    from serve.bypass import Passages
    from serve.grpc.bypass import past_ray
    from serve.grpc.decode_errors import forgiving
    from serve.grpc.slow_clients import leaving_slow
    from serve.http.proxy_headers import proxy_middlewares

    proxy: Any = _proxy  # its own imports are no part of what it exports
    passages = Passages(ray.get_runtime_context().get_node_id())
    slow_s = float(os.environ.get(SLOW_VARIABLE, SLOW_CLIENT_TIMEOUT_S))

    def add_grpc_address(server: Any, address: str) -> None:
        address = bound_address(address, os.environ.get(HOST_VARIABLE, "127.0.0.1"))
        files = {role: os.environ.get(name) for role, name in TLS_VARIABLES.items()}
        if files["certificate"] and files["key"]:
            from serve.grpc.tls import TlsFiles

            server.add_secure_port(
                address, TlsFiles(certificate=files["certificate"], key=files["key"], client_ca=files["client_ca"]).credentials()
            )
        else:
            server.add_insecure_port(address)

    override = gRPCGenericServer._override_method_handler
    gRPCGenericServer._override_method_handler = lambda server, method, handler: leaving_slow(  # type: ignore[assignment, method-assign]
        past_ray(forgiving(override(server, method, handler)), passages), slow_s
    )
    default_impl.add_grpc_address = add_grpc_address  # type: ignore[assignment]
    http_util.socket = PreparedSockets(slow_s)  # type: ignore[attr-defined, assignment]  # it makes the one that it listens on, and no other
    proxy.get_http_response_status = told_as_ours(proxy.get_http_response_status, over_grpc=False)
    proxy.get_grpc_response_status = told_as_ours(proxy.get_grpc_response_status, over_grpc=True)
    return proxy_middlewares(passages)


def told_as_ours(status_of: Callable[..., Any], *, over_grpc: bool) -> Callable[..., Any]:
    """Ray Serve's own function from an error to a status, but that a client is told nothing of actors, hosts and tracebacks, and in the
    shape of all our errors: where a front is lost or cannot be reached, that it may try again. A stream that has begun only breaks over
    HTTP."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, gRPCStatusError

    from serve.errors import FrontLost, describe
    from serve.http.errors import error_object

    def told(error: BaseException, timeout_s: float | None, request_id: str) -> Any:
        status = status_of(error, timeout_s, request_id)
        if isinstance(error, (TimeoutError, asyncio.CancelledError, gRPCStatusError)):
            return status
        out_of_reach = isinstance(error, RayError) and not isinstance(error, RayTaskError)
        body = describe(FrontLost() if out_of_reach or isinstance(error, (BackPressureError, DeploymentUnavailableError)) else error)
        if over_grpc:
            return dataclasses.replace(status, code=type(status.code)[body.grpc_code], message=body.message)
        headers = [(b"retry-after", b"%d" % body.retry_after_s)] if body.retry_after_s else None
        return dataclasses.replace(status, code=body.http_status, message=error_object(body), headers=headers)

    return told


class PreparedSockets:
    """The module `socket`, with sockets for HTTP to listen on; connections inherit what is set here.

    Connections of a proxy that was killed cool down for a minute, and without `SO_REUSEADDR` nobody may listen at their port meanwhile.
    (`SO_REUSEPORT`, which Ray Serve can set instead, lets two servers share a port without knowing.) The kernel itself ends a connection
    whose client takes nothing for so long: it alone knows what still waits after an answer was written.
    """

    def __init__(self, slow_client_timeout_s: float) -> None:
        self._slow_client_timeout_s = slow_client_timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *kind: Any) -> socket.socket:
        made = socket.socket(*kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._slow_client_timeout_s * 1000))
        return made


def bound_address(address: str, host: str) -> str:
    """Ray Serve's ``[::]:9000`` with ``host`` for its host."""
    if not address.startswith(f"{EVERY_ADDRESS}:"):
        raise ValueError(f"Ray Serve was to bind {address!r}; this hook was written for {EVERY_ADDRESS}")
    port = address.removeprefix(EVERY_ADDRESS)
    return f"[{host}]{port}" if ":" in host else f"{host}{port}"
